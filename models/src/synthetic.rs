//! Models of real shapes with random weights: for speed, plumbing and tests, never for text.
