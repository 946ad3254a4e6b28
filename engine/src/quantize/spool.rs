//! Values of the calibration text between two steps of a recipe, in a file without a name: a few bytes a token and
//! input are gigabytes, and they are read one piece of the text at a time.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};

use crate::Error;

/// Arrays of floats, several a piece of the text.
pub struct Spool {
    file: File,
    /// Where each array begins, in bytes, and how many floats it has.
    places: Vec<Vec<(u64, usize)>>,
    end: u64,
}

fn failed(error: std::io::Error) -> Error {
    Error::machine(format!(
        "a temporary file in {}: {error} (TMPDIR names another folder)",
        std::env::temp_dir().display()
    ))
}

impl Spool {
    /// Holds nothing.
    ///
    /// # Errors
    /// [`Error::Machine`] if no file can be made.
    pub fn new() -> Result<Spool, Error> {
        Ok(Spool {
            file: tempfile::tempfile().map_err(failed)?,
            places: Vec::new(),
            end: 0,
        })
    }

    /// Appends the arrays of the next piece.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no room.
    pub fn push(&mut self, arrays: &[Vec<f32>]) -> Result<(), Error> {
        let mut places = Vec::with_capacity(arrays.len());
        for array in arrays {
            places.push((self.end, array.len()));
            self.put(self.end, array)?;
            self.end += size_of_val(array.as_slice()) as u64;
        }
        self.places.push(places);
        Ok(())
    }

    /// Array `array` of piece `piece`.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is none or it cannot be read.
    pub fn read(&mut self, piece: usize, array: usize) -> Result<Vec<f32>, Error> {
        let (start, len) = self.place(piece, array)?;
        let mut values = vec![0f32; len];
        self.file.seek(SeekFrom::Start(start)).map_err(failed)?;
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.file.read_exact(bytes).map_err(failed)?;
        Ok(values)
    }

    /// Puts other values in the place of an array's.
    ///
    /// # Errors
    /// As [`Spool::read`]; also values of another length.
    pub fn replace(&mut self, piece: usize, array: usize, values: &[f32]) -> Result<(), Error> {
        let (start, len) = self.place(piece, array)?;
        if values.len() != len {
            return Err(Error::machine(format!("{} values for {len}", values.len())));
        }
        self.put(start, values)
    }

    fn put(&mut self, start: u64, values: &[f32]) -> Result<(), Error> {
        self.file.seek(SeekFrom::Start(start)).map_err(failed)?;
        let bytes = bytemuck::cast_slice(values);
        self.file.write_all(bytes).map_err(failed)
    }

    fn place(&self, piece: usize, array: usize) -> Result<(u64, usize), Error> {
        let place = self.places.get(piece).and_then(|places| places.get(array));
        let absent = || Error::machine(format!("piece {piece} of the text has no array {array}"));
        place.copied().ok_or_else(absent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_come_back_and_can_be_replaced() {
        let mut spool = Spool::new().expect("a file");
        spool.push(&[vec![1.0, 2.0], vec![3.0]]).expect("written");
        spool.push(&[vec![4.0; 5], vec![]]).expect("written");
        spool.replace(0, 1, &[-3.0]).expect("replaced");
        assert_eq!(spool.read(1, 0).expect("read"), [4.0; 5]);
        assert_eq!(spool.read(0, 0).expect("read"), [1.0, 2.0]);
        assert_eq!(spool.read(0, 1).expect("read"), [-3.0]);
        assert!(spool.read(1, 1).expect("read").is_empty());
        for error in [
            spool.read(2, 0).expect_err("no piece"),
            spool.read(0, 2).expect_err("no array"),
            spool.replace(0, 0, &[1.0]).expect_err("another length"),
        ] {
            assert_eq!(error.exit_code(), 1);
        }
    }
}
