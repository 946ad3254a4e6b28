//! Names of repositories and files on a model hub: `hf:OWNER/REPO[@REVISION][:FILE]`.

use std::str::FromStr;

use crate::Error;
use crate::error::shown;

/// What such a name begins with.
pub const PREFIX: &str = "hf:";
/// The revision that is meant when none is named.
pub const DEFAULT_REVISION: &str = "main";
/// Longest name.
const MAX_BYTES: usize = 512;

/// A repository on a model hub, or one file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `OWNER/REPO`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Path of a file inside the repository; without it, whatever a model needs.
    pub file: Option<String>,
}

impl FromStr for HubName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = || Error::HubName { name: shown(text) };
        let rest = text
            .strip_prefix(PREFIX)
            .filter(|rest| rest.len() <= MAX_BYTES)
            .ok_or_else(fail)?;
        let (place, file) = match rest.split_once(':') {
            Some((place, file)) => (place, Some(file)),
            None => (rest, None),
        };
        let (repo, revision) = place.split_once('@').unwrap_or((place, DEFAULT_REVISION));
        let (owner, name) = repo.split_once('/').ok_or_else(fail)?;
        let fits = [owner, name, revision].into_iter().all(is_plain);
        if !fits || !file.is_none_or(is_safe_path) {
            return Err(fail());
        }
        Ok(Self {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

/// Letters, digits and `-`, `_`, `.`, and not a name that a file system gives a meaning.
fn is_plain(part: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && !part.starts_with('.') && part.chars().all(fits)
}

/// Whether a path that a server or a user gives stays inside the folder that it is joined to, on
/// every system, and means the same in a URL: parts between single slashes, none of them hidden.
pub fn is_safe_path(path: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.+=,@~()".contains(c);
    path.len() <= MAX_BYTES
        && path
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.') && part.chars().all(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_their_parts() {
        let name = |repo: &str, revision: &str, file: Option<&str>| HubName {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        };
        for (text, expected) in [
            ("hf:o/r", name("o/r", "main", None)),
            (
                "hf:O-1/r.b:q4/m.gguf",
                name("O-1/r.b", "main", Some("q4/m.gguf")),
            ),
            ("hf:o/r@v1.0:m.gguf", name("o/r", "v1.0", Some("m.gguf"))),
        ] {
            assert_eq!(text.parse::<HubName>().unwrap(), expected);
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for text in [
            "o/r",
            "hf:",
            "hf:r",
            "hf:o/",
            "hf:/r",
            "hf:o/r/s",
            "hf:../r",
            "hf:o/..",
            "hf:o/r:",
            "hf:o/r:../m",
            "hf:o/r:/m",
            "hf:o/r:a//b",
            "hf:o/r:a/../b",
            "hf:o/r:a\\b",
            "hf:o/r@:m",
            "hf:o/r@../x:m",
            "hf:o/r:C:m",
            "hf:o/r?x",
            "hf:o/r:m\n",
            "hf:ö/r",
            "hf:o/r:.git/config",
        ] {
            let error = text.parse::<HubName>().expect_err(text).to_string();
            assert!(
                error.contains("OWNER/REPO") && !error.contains('\n'),
                "{error}"
            );
        }
    }
}
