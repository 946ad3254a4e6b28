//! Files that appear whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use engine::Error;

/// A file that is written beside its place and renamed into it by [`AtomicFile::commit`]; dropped
/// before that, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    target: PathBuf,
    part: PathBuf,
    writer: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Starts a file that will be at `target`.
    ///
    /// # Errors
    /// [`Error::Input`] if `target` cannot be a file, or its folder cannot be written.
    pub fn create(target: &Path) -> Result<Self, Error> {
        let fail = |why: &dyn std::fmt::Display| {
            Error::Input(format!("cannot write {}: {why}", target.display()))
        };
        if target.is_dir() {
            return Err(fail(&"it is a directory"));
        }
        let mut name = target
            .file_name()
            .ok_or_else(|| fail(&"it is not a file name"))?
            .to_owned();
        name.push(format!(".{}.part", std::process::id()));
        let part = target.with_file_name(name);
        let file = File::create(&part).map_err(|e| fail(&e))?;
        Ok(Self {
            target: target.to_owned(),
            part,
            writer: Some(BufWriter::with_capacity(1 << 20, file)),
        })
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// [`Error::Machine`] if the rest cannot be written or the file not renamed.
    pub fn commit(mut self) -> Result<(), Error> {
        let finish = |writer: BufWriter<File>| -> io::Result<()> {
            writer
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?
                .sync_all()?;
            std::fs::rename(&self.part, &self.target)
        };
        match self.writer.take() {
            Some(writer) => finish(writer).map_err(|e| {
                // Not committed: the part is of no use to anybody.
                let _ = std::fs::remove_file(&self.part);
                Error::Machine(format!("cannot write {}: {e}", self.target.display()))
            }),
            None => Ok(()),
        }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match &mut self.writer {
            Some(writer) => writer.write(data),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.writer.take().is_some() {
            // Nothing to tell if it is gone already.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_only_when_committed() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("out.bin");
        let mut file = AtomicFile::create(&target).expect("created");
        file.write_all(b"half").expect("written");
        drop(file);
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 0);

        let mut file = AtomicFile::create(&target).expect("created");
        file.write_all(b"whole").expect("written");
        assert!(!target.exists());
        file.commit().expect("committed");
        assert_eq!(std::fs::read(&target).expect("read"), b"whole");
        assert_eq!(std::fs::read_dir(folder.path()).expect("listed").count(), 1);
    }

    #[test]
    fn impossible_targets_are_input_errors() {
        let folder = tempfile::tempdir().expect("a folder");
        for target in [
            folder.path().to_owned(),
            folder.path().join("no/such/folder"),
        ] {
            let error = AtomicFile::create(&target).expect_err("refused");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
