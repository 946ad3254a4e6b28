//! One file: fetched into a part beside its place, gone on with after a cut, compared with the hub's
//! hash and renamed.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use indicatif::ProgressBar;
use models::hub_name::HubName;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::http::{StatusCode, header};

use super::request::{Failure, LINKED_ETAG, LINKED_SIZE, Method, text};
use super::{Hub, Listing};
use crate::Error;

/// Attempts in a row that bring nothing, after which a transfer is given up.
const MAX_IDLE_ATTEMPTS: u32 = 4;
/// Wait before the second such attempt; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Longest wait that a server is granted.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
const BUFFER_BYTES: usize = 1 << 20;

/// How a file came here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// It was here, intact.
    AlreadyHere,
    /// It was transferred and its hash compared.
    Verified,
    /// It was transferred; the hub gave no hash to compare.
    Unverified,
}

impl Hub {
    /// Fetches `file` of `name`'s repository, as it was at the listing's commit, to `target`. Shows
    /// its bytes on `progress`.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such file or it may not be read; [`Error::Machine`] if the
    /// connection stays cut (the part is kept, and the next call goes on from there), the hash is
    /// wrong (nothing is kept), or the disk fails.
    pub fn fetch(
        &self,
        name: &HubName,
        listing: &Listing,
        file: &str,
        target: &Path,
        progress: &ProgressBar,
    ) -> Result<Fetched, Error> {
        let remote = Remote {
            hub: self,
            url: format!(
                "{}/{}/resolve/{}/{file}",
                self.endpoint, name.repo, listing.commit
            ),
            what: format!("{} of {}", file, name.repo),
        };
        let about = with_patience(|| remote.about().map_err(|failure| (failure, false)))?;
        progress.set_length(about.bytes);
        if fs::metadata(target).is_ok_and(|here| here.is_file() && here.len() == about.bytes) {
            let mut hash = about.hash();
            hash.read(&mut File::open(target).map_err(disk(target))?)
                .map_err(disk(target))?;
            if about.expected.is_some() && hash.finish() == about.expected {
                return Ok(Fetched::AlreadyHere);
            }
        }
        let mut part = Part::open(target, &about)?;
        progress.set_position(part.bytes);
        // Not what an attempt brought counts, but what is new: a server may start over every time.
        let mut most = part.bytes;
        with_patience(|| {
            let result = remote.append(&mut part, &about, progress);
            let news = part.bytes > most;
            most = most.max(part.bytes);
            result.map_err(|failure| (failure, news))
        })
        .map_err(|error| match error {
            Error::Machine(why) => Error::Machine(format!(
                "{why}; {} of {} bytes are kept, the same command goes on from there",
                part.bytes, about.bytes
            )),
            error => error,
        })?;
        part.finish(target, &about, &remote.what)
    }
}

/// Calls `attempt` until it succeeds, fails for good, or brings nothing several times in a row; it
/// returns with its failure whether it brought something.
fn with_patience<T>(mut attempt: impl FnMut() -> Result<T, (Failure, bool)>) -> Result<T, Error> {
    let mut idle = 0;
    loop {
        let (why, wait) = match attempt() {
            Ok(value) => return Ok(value),
            Err((Failure::Final(error), _)) => return Err(error),
            Err((Failure::Again(why, wait), brought)) => {
                idle = if brought { 0 } else { idle + 1 };
                (why, wait)
            }
        };
        if idle >= MAX_IDLE_ATTEMPTS || wait.is_some_and(|wait| wait > LONGEST_WAIT) {
            return Err(Error::Machine(why));
        }
        thread::sleep(wait.unwrap_or(FIRST_WAIT * 2u32.pow(idle)));
    }
}

/// A file on the hub.
struct Remote<'a> {
    hub: &'a Hub,
    url: String,
    /// In words.
    what: String,
}

/// What the hub says about a file.
struct About {
    bytes: u64,
    /// Names this version of the file.
    etag: String,
    /// Lower-case hexadecimal digits: 64 of a SHA-256 for large files, 40 of git's SHA-1 for others.
    expected: Option<String>,
}

impl About {
    fn hash(&self) -> Hash {
        match self.expected.as_ref().map(String::len) {
            Some(64) => Hash::Sha256(Sha256::new()),
            Some(_) => {
                let head = format!("blob {}\0", self.bytes);
                Hash::Git(Sha1::new().chain_update(head))
            }
            None => Hash::Unknown,
        }
    }
}

impl Remote<'_> {
    fn about(&self) -> Result<About, Failure> {
        let answer = self.hub.ask(&self.url, Method::Head, &self.what)?;
        let headers = answer.headers();
        let size = text(headers, LINKED_SIZE)
            .or_else(|| text(headers, header::CONTENT_LENGTH.as_str()))
            .and_then(|size| size.parse().ok());
        let bytes = size.ok_or_else(|| {
            Error::Machine(format!(
                "{}: the hub does not say how large it is",
                self.what
            ))
        })?;
        let etag = text(headers, LINKED_ETAG)
            .or_else(|| text(headers, header::ETAG.as_str()))
            .unwrap_or_default();
        let etag = etag
            .trim_start_matches("W/")
            .trim_matches('"')
            .to_ascii_lowercase();
        let is_hash = matches!(etag.len(), 40 | 64) && etag.bytes().all(|b| b.is_ascii_hexdigit());
        Ok(About {
            bytes,
            expected: is_hash.then(|| etag.clone()),
            etag,
        })
    }

    /// Fetches what `part` lacks, up to the end or to a cut.
    fn append(
        &self,
        part: &mut Part,
        about: &About,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        if part.bytes == about.bytes {
            return Ok(());
        }
        let answer = self
            .hub
            .ask(&self.url, Method::GetFrom(part.bytes), &self.what)?;
        let starts_at = match answer.status() {
            StatusCode::PARTIAL_CONTENT => range_start(
                text(answer.headers(), header::CONTENT_RANGE.as_str()),
                about.bytes,
            ),
            // The server knows no ranges: all of it comes again.
            _ => Some(0),
        };
        match starts_at {
            Some(0) if part.bytes > 0 => part.restart(about)?,
            Some(start) if start == part.bytes => {}
            _ => {
                let why = format!("{}: the hub sent another range than asked for", self.what);
                return Err(Error::Machine(why).into());
            }
        }
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        while part.bytes < about.bytes {
            // Not a byte beyond the announced size is taken.
            let room = usize::try_from(about.bytes - part.bytes).unwrap_or(BUFFER_BYTES);
            let cut = |why: &str| {
                let why = format!("{}: the connection was cut ({why})", self.what);
                Failure::Again(why, None)
            };
            match body.read(&mut buffer[..room.min(BUFFER_BYTES)]) {
                Ok(0) => return Err(cut("end of data")),
                Ok(bytes) => part.write(&buffer[..bytes])?,
                Err(error) => return Err(cut(&error.to_string())),
            }
            progress.set_position(part.bytes);
        }
        Ok(())
    }
}

/// The first byte of `bytes START-END/TOTAL`, if the total is `total`.
fn range_start(content_range: Option<&str>, total: u64) -> Option<u64> {
    let (range, whole) = content_range?.strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    (whole.trim().parse() == Ok(total)).then_some(())?;
    start.trim().parse().ok()
}

/// The beginning of a file. It is named after the version on the hub, and locked: another process
/// that fetches the same file is told so.
struct Part {
    path: PathBuf,
    file: File,
    hash: Hash,
    bytes: u64,
}

impl Part {
    fn open(target: &Path, about: &About) -> Result<Self, Error> {
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder).map_err(disk(folder))?;
        }
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(
            ".{}.part",
            &hex(&Sha256::digest(&about.etag))[..16]
        ));
        let path = target.with_file_name(name);
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(disk(&path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Machine(format!(
                    "{} is being fetched by another process",
                    target.display()
                )));
            }
            // A file system without locks: the hash tells if two wrote at once.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        let mut hash = about.hash();
        let bytes = hash.read(&mut file).map_err(disk(&path))?;
        let mut part = Self {
            path,
            file,
            hash,
            bytes,
        };
        if part.bytes > about.bytes {
            part.restart(about)?;
        }
        Ok(part)
    }

    fn restart(&mut self, about: &About) -> Result<(), Error> {
        use std::io::Seek;
        self.file.set_len(0).map_err(disk(&self.path))?;
        self.file.rewind().map_err(disk(&self.path))?;
        self.hash = about.hash();
        self.bytes = 0;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(disk(&self.path))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Compares the hash and puts the file in its place; a file with a wrong one is removed.
    fn finish(self, target: &Path, about: &About, what: &str) -> Result<Fetched, Error> {
        let found = self.hash.finish();
        if about.expected != found {
            fs::remove_file(&self.path).map_err(disk(&self.path))?;
            return Err(Error::Machine(format!(
                "{what}: its hash is {}, the hub says {}: nothing was kept; try again, and if it stays so do not use it",
                found.unwrap_or_default(),
                about.expected.as_deref().unwrap_or_default()
            )));
        }
        self.file.sync_all().map_err(disk(&self.path))?;
        fs::rename(&self.path, target).map_err(disk(target))?;
        Ok(match about.expected {
            Some(_) => Fetched::Verified,
            None => Fetched::Unverified,
        })
    }
}

/// The hash that the hub gives for a file.
enum Hash {
    Sha256(Sha256),
    Git(Sha1),
    Unknown,
}

impl Hash {
    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hash::Sha256(hash) => hash.update(bytes),
            Hash::Git(hash) => hash.update(bytes),
            Hash::Unknown => {}
        }
    }

    /// Takes the rest of `file`; returns its bytes.
    fn read(&mut self, file: &mut File) -> std::io::Result<u64> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut total = 0;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(total),
                bytes => {
                    self.update(&buffer[..bytes]);
                    total += bytes as u64;
                }
            }
        }
    }

    fn finish(self) -> Option<String> {
        match self {
            Hash::Sha256(hash) => Some(hex(&hash.finalize())),
            Hash::Git(hash) => Some(hex(&hash.finalize())),
            Hash::Unknown => None,
        }
    }
}

/// SHA-256 of the file at `path` in hexadecimal digits.
///
/// # Errors
/// [`Error::Machine`] if it cannot be read.
pub fn sha256_of(path: &Path) -> Result<String, Error> {
    let mut hash = Hash::Sha256(Sha256::new());
    let mut file = File::open(path).map_err(disk(path))?;
    hash.read(&mut file).map_err(disk(path))?;
    Ok(hash.finish().unwrap_or_default())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn disk(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |error| Error::Machine(format!("{path}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_only_of_the_right_file() {
        assert_eq!(range_start(Some("bytes 5-9/10"), 10), Some(5));
        for bad in ["bytes 5-9/11", "bytes 5-9/*", "5-9/10", "bytes x-9/10", ""] {
            assert_eq!(range_start(Some(bad), 10), None, "{bad}");
        }
        assert_eq!(range_start(None, 10), None);
    }

    #[test]
    fn small_files_have_gits_hash() {
        let about = About {
            bytes: 6,
            etag: String::new(),
            expected: Some("0".repeat(40)),
        };
        let mut hash = about.hash();
        hash.update(b"hello\n");
        let known = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(hash.finish().as_deref(), Some(known));
    }
}
