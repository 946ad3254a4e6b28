//! The folder in which fetched tools are kept.

use std::env;
use std::path::PathBuf;

use crate::Error;

/// `$XDG_CACHE_HOME/edgellm`, or `~/.cache/edgellm`.
///
/// # Errors
/// Neither variable is set.
pub fn dir() -> Result<PathBuf, Error> {
    dir_from(
        env::var_os("XDG_CACHE_HOME").map(PathBuf::from),
        env::var_os("HOME").map(PathBuf::from),
    )
}

/// The rule of [`dir`] with the variables as arguments. A relative `XDG_CACHE_HOME` is ignored, as
/// the XDG base directory specification asks.
fn dir_from(xdg_cache_home: Option<PathBuf>, home: Option<PathBuf>) -> Result<PathBuf, Error> {
    let base = xdg_cache_home
        .filter(|path| path.is_absolute())
        .or_else(|| {
            home.filter(|path| path.is_absolute())
                .map(|path| path.join(".cache"))
        })
        .ok_or_else(|| {
            Error::Setup("no cache folder: set HOME or XDG_CACHE_HOME to a full path".into())
        })?;
    Ok(base.join("edgellm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdg_comes_before_home() {
        let dir = dir_from(Some("/x".into()), Some("/h".into())).unwrap();
        assert_eq!(dir, PathBuf::from("/x/edgellm"));
        let dir = dir_from(None, Some("/h".into())).unwrap();
        assert_eq!(dir, PathBuf::from("/h/.cache/edgellm"));
        let dir = dir_from(Some("relative".into()), Some("/h".into())).unwrap();
        assert_eq!(dir, PathBuf::from("/h/.cache/edgellm"));
        assert!(dir_from(None, None).is_err());
    }
}
