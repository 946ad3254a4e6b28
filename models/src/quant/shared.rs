//! Values of a matrix: owned, or lying in a mapped file that is used as it is.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use bytes::Bytes;

/// A slice that is owned or shares bytes with whoever holds the file. Changing it makes it owned.
#[derive(Clone)]
pub struct Shared<T>(Place<T>);

#[derive(Clone)]
enum Place<T> {
    Owned(Vec<T>),
    /// A whole number of aligned `T`.
    InFile(Bytes),
}

impl<T: Pod> Shared<T> {
    /// `bytes` as values, without a copy. `None` where they are no whole number of values or not
    /// aligned as values have to be.
    pub fn from_bytes(bytes: Bytes) -> Option<Self> {
        bytemuck::try_cast_slice::<u8, T>(&bytes).ok()?;
        Some(Shared(Place::InFile(bytes)))
    }

    /// Cuts off what lies behind the first `len` values; the memory of owned ones is given back.
    pub fn truncate(&mut self, len: usize) {
        match &mut self.0 {
            Place::Owned(values) => {
                values.truncate(len);
                values.shrink_to_fit();
            }
            Place::InFile(bytes) => bytes.truncate(len * size_of::<T>()),
        }
    }

    /// The values as a vector; copies them once if they lie in a file.
    pub fn to_mut(&mut self) -> &mut Vec<T> {
        if let Place::InFile(bytes) = &self.0 {
            self.0 = Place::Owned(bytemuck::cast_slice(bytes).to_vec());
        }
        match &mut self.0 {
            Place::Owned(values) => values,
            Place::InFile(_) => unreachable!("was made owned above"),
        }
    }
}

impl<T: Pod> Deref for Shared<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match &self.0 {
            Place::Owned(values) => values,
            Place::InFile(bytes) => bytemuck::cast_slice(bytes),
        }
    }
}

impl<T: Pod> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.to_mut()
    }
}

impl<T> From<Vec<T>> for Shared<T> {
    fn from(values: Vec<T>) -> Self {
        Shared(Place::Owned(values))
    }
}

impl<T> FromIterator<T> for Shared<T> {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        Vec::from_iter(values).into()
    }
}

impl<T: Pod + PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl<'a, T: Pod> IntoIterator for &'a Shared<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_used_in_place_and_copied_when_changed() {
        let values = Bytes::from_owner(AlignedWords([1, 2, 3]));
        let mut shared = Shared::<u32>::from_bytes(values.clone()).expect("aligned");
        assert_eq!(*shared, [1, 2, 3]);
        assert_eq!(shared.as_ptr().cast(), values.as_ptr());
        shared[1] = 7;
        assert_eq!(shared, Shared::from(vec![1, 7, 3]));
        assert_eq!(values[4], 2);
        let mut in_file = Shared::<u32>::from_bytes(values.clone()).expect("aligned");
        for shared in [&mut shared, &mut in_file] {
            shared.truncate(2);
            assert_eq!(shared.len(), 2);
        }
        assert_eq!(in_file, Shared::from(vec![1, 2]));
    }

    #[test]
    fn bytes_that_are_no_values_are_refused() {
        let values = Bytes::from_owner(AlignedWords([1, 2, 3]));
        assert!(Shared::<u32>::from_bytes(values.slice(..6)).is_none());
        assert!(Shared::<u32>::from_bytes(values.slice(2..6)).is_none());
        assert!(Shared::<u16>::from_bytes(values.slice(2..6)).is_some());
    }

    struct AlignedWords([u32; 3]);

    impl AsRef<[u8]> for AlignedWords {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
}
