//! Saved predictions of a reference model: what `--save-logits` writes.
//!
//! All numbers little-endian:
//!
//! ```text
//! "EDGELOGP"  version u32 = 1  V u32  window length u32  windows u32
//! name of the model: length u32, UTF-8
//! token ids (windows, length) u32
//! for each scored position of each window, a record:
//!     ln p(next) f32   ln p(all tokens that are not stored) f32   ln p(top) f32
//!     top u32   count u32
//!     count x { id: difference from the one before in 7-bit groups, fall below ln p(top): u16 in 1/2048 }
//! SHA-256 of everything above
//! ```
//!
//! Stored are the likeliest tokens, up to 99.9% of the probability; the others are one bucket. The
//! divergence of bucketed distributions is never above the true one (log-sum inequality) and, as the
//! bucket holds a thousandth, two thousandths below.

use std::io::Write;

use sha2::{Digest, Sha256};

use super::{Prediction, Windows};
use crate::Error;

/// First bytes of a file.
pub const MAGIC: &[u8; 8] = b"EDGELOGP";
const VERSION: u32 = 1;
/// Probability that the stored tokens have together at least, unless the range of `u16` ends first.
const MASS_STORED: f64 = 0.999;
/// Steps of a stored fall in one nat.
const STEPS_PER_NAT: f64 = 2048.0;
const HASH_BYTES: usize = 32;
/// More would be no name.
const MAX_NAME_BYTES: usize = 4096;

/// A saved prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredPrediction {
    /// Log-probability of the token that follows.
    pub next_log_prob: f32,
    /// The likeliest token.
    pub top: u32,
    /// Stored tokens, ascending.
    ids: Vec<u32>,
    /// Their probabilities, then that of all others together; the sum is 1.
    probabilities: Vec<f64>,
}

impl StoredPrediction {
    /// Divergence of `model` from this prediction, in nats.
    ///
    /// # Panics
    /// If a stored token is outside the model's vocabulary.
    pub fn kl(&self, model: &Prediction<'_>) -> f64 {
        let (rest, stored) = self
            .probabilities
            .split_last()
            .expect("the rest is always there");
        let (mut kl, mut left) = (0.0, 1.0);
        for (p, id) in stored.iter().zip(&self.ids) {
            let log_q = model.log_prob(*id);
            left -= log_q.exp();
            kl += p * (p.ln() - log_q);
        }
        match *rest > 0.0 {
            // What rounding leaves of nothing must not become a huge divergence.
            true => kl + rest * (rest.ln() - left.max(1e-12).ln()),
            false => kl,
        }
    }
}

/// Writes the records of one file in order.
pub struct Writer<W: Write> {
    out: W,
    hash: Sha256,
}

impl<W: Write> Writer<W> {
    /// Starts a file of the predictions of the model `name` with a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// [`Error::Machine`] if `out` fails, [`Error::Input`] if a number is beyond the format.
    pub fn new(out: W, name: &str, vocab: usize, windows: &Windows) -> Result<Self, Error> {
        let mut writer = Self {
            out,
            hash: Sha256::new(),
        };
        let name = &name[..name.floor_char_boundary(MAX_NAME_BYTES)];
        let mut header = MAGIC.to_vec();
        for number in [
            VERSION as usize,
            vocab,
            windows.length(),
            windows.count(),
            name.len(),
        ] {
            let number = u32::try_from(number).map_err(Error::input)?;
            header.extend(number.to_le_bytes());
        }
        header.extend(name.as_bytes());
        header.extend(windows.ids().iter().flat_map(|id| id.to_le_bytes()));
        writer.write(&header)?;
        Ok(writer)
    }

    /// Appends records made by [`record`].
    ///
    /// # Errors
    /// [`Error::Machine`] if the output fails.
    pub fn write(&mut self, records: &[u8]) -> Result<(), Error> {
        self.hash.update(records);
        self.out
            .write_all(records)
            .map_err(|e| Error::Machine(format!("cannot write the logits: {e}")))
    }

    /// Ends the file and gives the output back.
    ///
    /// # Errors
    /// [`Error::Machine`] if the output fails.
    pub fn finish(mut self) -> Result<W, Error> {
        let hash = self.hash.finalize_reset();
        self.out
            .write_all(&hash)
            .map_err(|e| Error::Machine(format!("cannot write the logits: {e}")))?;
        Ok(self.out)
    }
}

/// The record of one position: `next` is the token that follows.
pub fn record(prediction: &Prediction<'_>, next: u32) -> Vec<u8> {
    let top = prediction.log_prob(prediction.top());
    let steps = |id: u32| ((top - prediction.log_prob(id)) * STEPS_PER_NAT).round();
    // The probability at each fall, to find the fall that the stored mass ends at.
    let mut mass = vec![0.0f64; usize::from(u16::MAX) + 1];
    let ids = 0..prediction.vocab() as u32;
    for id in ids.clone() {
        if let Some(mass) = mass.get_mut(steps(id) as usize) {
            *mass += prediction.log_prob(id).exp();
        }
    }
    let mut sum = 0.0;
    let last = mass.iter().position(|mass| {
        sum += mass;
        sum >= MASS_STORED
    });
    let last = last.unwrap_or(mass.len() - 1) as f64;

    let (mut stored, mut count, mut before, mut rest) = (Vec::new(), 0u32, 0, 0.0f64);
    for id in ids {
        let fall = steps(id);
        if fall > last {
            rest += prediction.log_prob(id).exp();
            continue;
        }
        let mut difference = id - before;
        while difference >= 0x80 {
            stored.push(difference as u8 | 0x80);
            difference >>= 7;
        }
        stored.push(difference as u8);
        stored.extend((fall as u16).to_le_bytes());
        before = id;
        count += 1;
    }
    let mut out = Vec::with_capacity(20 + stored.len());
    for number in [prediction.log_prob(next), rest.ln(), top] {
        out.extend((number as f32).to_le_bytes());
    }
    out.extend(prediction.top().to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend(stored);
    out
}

/// A file of saved predictions that is read window by window.
#[derive(Debug, Clone)]
pub struct LogProbs<'a> {
    /// Model that made them.
    pub name: &'a str,
    /// Tokens of its vocabulary.
    pub vocab: usize,
    /// The text.
    pub windows: Windows,
    records: Cursor<'a>,
}

impl<'a> LogProbs<'a> {
    /// Reads the head of a file and compares its checksum.
    ///
    /// # Errors
    /// [`Error::Input`] that says what is wrong with the file.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let body = match bytes.strip_prefix(MAGIC) {
            None => return Err(fault("it is not a file of saved logits")),
            Some(rest) => rest.len().checked_sub(HASH_BYTES),
        };
        let (body, hash) = match body {
            None => return Err(fault("it ends early")),
            Some(_) => bytes.split_at(bytes.len() - HASH_BYTES),
        };
        let mut cursor = Cursor(&body[MAGIC.len()..]);
        let version = cursor.u32()?;
        if version != VERSION {
            return Err(fault(&format!(
                "its version is {version}, this program reads {VERSION}"
            )));
        }
        if Sha256::digest(body)[..] != *hash {
            return Err(fault("its checksum is wrong: it is damaged or incomplete"));
        }
        let [vocab, length, count, name] = [(); 4].map(|()| cursor.u32());
        let (vocab, length, count) = (vocab? as usize, length? as usize, count? as usize);
        let name = std::str::from_utf8(cursor.take(name? as usize)?)
            .map_err(|_| fault("its model name is not UTF-8"))?;
        let ids = length
            .checked_mul(count)
            .and_then(|ids| ids.checked_mul(size_of::<u32>()))
            .ok_or_else(|| fault("it ends early"))?;
        let (ids, _) = cursor.take(ids)?.as_chunks();
        let ids: Vec<u32> = ids.iter().map(|id| u32::from_le_bytes(*id)).collect();
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
            return Err(fault(&format!(
                "token {id} is outside its vocabulary of {vocab}"
            )));
        }
        Ok(Self {
            name,
            vocab,
            windows: Windows::cut(ids, length, None, None)?,
            records: cursor,
        })
    }

    /// The predictions of the next window, one for each of its scored positions.
    ///
    /// # Errors
    /// [`Error::Input`] if the file has no further window or a record is malformed.
    pub fn next_window(&mut self) -> Result<Vec<StoredPrediction>, Error> {
        let positions = self.windows.scored();
        positions.map(|_| self.records.record(self.vocab)).collect()
    }
}

fn fault(what: &str) -> Error {
    Error::Input(format!("saved logits: {what}"))
}

/// Bytes that are not read yet.
#[derive(Debug, Clone)]
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self
            .0
            .split_at_checked(bytes)
            .ok_or_else(|| fault("it ends early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let (taken, rest) = self
            .0
            .split_first_chunk()
            .ok_or_else(|| fault("it ends early"))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    /// A logarithm of a probability.
    fn log_prob(&mut self) -> Result<f32, Error> {
        let value = self.array().map(f32::from_le_bytes)?;
        match value <= 1e-3 {
            true => Ok(value),
            false => Err(fault("a probability is not between 0 and 1")),
        }
    }

    /// A number in 7-bit groups, the lowest first.
    fn groups(&mut self) -> Result<u32, Error> {
        let mut number = 0u64;
        for shift in (0..35).step_by(7) {
            let [byte] = self.array()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return u32::try_from(number).map_err(|_| fault("a token id is too large"));
            }
        }
        Err(fault("a token id is too large"))
    }

    fn record(&mut self, vocab: usize) -> Result<StoredPrediction, Error> {
        let (next_log_prob, rest, top_log_prob) =
            (self.log_prob()?, self.log_prob()?, self.log_prob()?);
        let (top, count) = (self.u32()?, self.u32()? as usize);
        // Each takes three bytes at least: what the file merely claims is not allocated.
        if count > vocab || count == 0 || count > self.0.len() / 3 || top as usize >= vocab {
            return Err(fault("a record is malformed"));
        }
        let mut ids: Vec<u32> = Vec::with_capacity(count);
        let mut probabilities = Vec::with_capacity(count + 1);
        let top_log_prob = f64::from(top_log_prob);
        for _ in 0..count {
            let difference = self.groups()?;
            let id = match ids.last() {
                None => Some(difference),
                Some(_) if difference == 0 => None,
                Some(before) => before.checked_add(difference),
            };
            let id = id
                .filter(|id| (*id as usize) < vocab)
                .ok_or_else(|| fault("a token id is outside the vocabulary or out of order"))?;
            ids.push(id);
            let fall = f64::from(self.array().map(u16::from_le_bytes)?) / STEPS_PER_NAT;
            probabilities.push((top_log_prob - fall).exp());
        }
        probabilities.push(f64::from(rest).exp());
        let total: f64 = probabilities.iter().sum();
        if !(0.5..2.0).contains(&total) {
            return Err(fault("the probabilities of a record do not add up to 1"));
        }
        probabilities.iter_mut().for_each(|p| *p /= total);
        Ok(StoredPrediction {
            next_log_prob,
            top,
            ids,
            probabilities,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: usize = 3000;

    /// Logits with a wide spread, the same for the same seed.
    fn logits(seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..VOCAB)
            .map(|_| (0..6).map(|_| 4.0 * next()).sum())
            .collect()
    }

    fn file() -> Vec<u8> {
        let windows = Windows::cut((0..32).collect(), 16, None, None).expect("cut");
        let mut writer = Writer::new(Vec::new(), "tiny", VOCAB, &windows).expect("started");
        for (number, ids) in windows.iter().enumerate() {
            for at in windows.scored() {
                let logits = logits((16 * number + at) as u64);
                let prediction = Prediction::new(&logits).expect("finite");
                writer
                    .write(&record(&prediction, ids[at + 1]))
                    .expect("written");
            }
        }
        writer.finish().expect("finished")
    }

    #[test]
    fn what_is_read_back_diverges_as_the_original_does() {
        let bytes = file();
        let mut read = LogProbs::parse(&bytes).expect("parsed");
        assert_eq!(
            (read.name, read.vocab, read.windows.count()),
            ("tiny", VOCAB, 2)
        );
        for number in 0..2 {
            let stored = read.next_window().expect("a window");
            assert_eq!(stored.len(), 7);
            for (at, stored) in read.windows.scored().zip(&stored) {
                let original = logits((16 * number + at) as u64);
                let original = Prediction::new(&original).expect("finite");
                assert_eq!(stored.top, original.top());
                let next = (16 * number + at + 1) as u32;
                assert_eq!(stored.next_log_prob, original.log_prob(next) as f32);
                assert!(
                    stored.kl(&original).abs() < 1e-7,
                    "{}",
                    stored.kl(&original)
                );
                let other: Vec<f32> = logits((16 * number + at) as u64)
                    .iter()
                    .zip(logits(77))
                    .map(|(logit, noise)| logit + 0.05 * noise)
                    .collect();
                let other = Prediction::new(&other).expect("finite");
                let (have, want) = (stored.kl(&other), original.kl(&other));
                assert!((have / want - 1.0).abs() < 5e-3, "{have} {want}");
            }
        }
        assert_eq!(read.next_window().expect_err("the end").exit_code(), 2);
    }

    #[test]
    fn damage_is_noticed() {
        let bytes = file();
        let refused = |bytes: &[u8], expected: &str| {
            let error = LogProbs::parse(bytes).expect_err(expected);
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{error}");
        };
        refused(b"GGUF", "not a file of saved logits");
        refused(&bytes[..20], "ends early");
        refused(&bytes[..bytes.len() - 1], "checksum");
        for at in [16, 40, bytes.len() / 2, bytes.len() - 1] {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            refused(&bytes, "checksum");
        }
        let mut newer = bytes.clone();
        newer[8] = 2;
        refused(&newer, "version is 2");
    }

    /// A file whose checksum is right and whose content is not.
    #[test]
    fn malformed_content_is_an_error_not_a_panic() {
        let bytes = file();
        let body = bytes.len() - HASH_BYTES;
        // Every byte of the head, then here and there.
        for at in (12..180).chain((180..body).step_by(997)) {
            for value in [0, 0x7F, 0xFF] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                let hash = Sha256::digest(&bytes[..body]);
                bytes[body..].copy_from_slice(&hash);
                if let Ok(mut read) = LogProbs::parse(&bytes) {
                    while read.next_window().is_ok() {}
                }
            }
        }
    }
}
