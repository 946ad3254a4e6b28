//! `cargo xtask check`: the invariants of this workspace, each a rule with a reason.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;

use crate::{Error, workspace};

mod lexer;
mod rules;

/// Checks the invariants that the compiler cannot: which room may hold what. Needs no build.
#[derive(Debug, Default, ClapArgs)]
pub struct Args {}

/// A rule and why it exists.
struct Rule {
    name: &'static str,
    why: &'static str,
    /// Returns what breaks the rule.
    find: fn(&Tree) -> Vec<Violation>,
}

/// A place that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    /// Path from the root, with forward slashes.
    path: String,
    /// Line, from 1; 0 for the whole file.
    line: usize,
    what: String,
}

impl Violation {
    fn in_line(file: &File, line: usize, what: impl Into<String>) -> Violation {
        Violation {
            path: file.path.clone(),
            line,
            what: what.into(),
        }
    }

    fn in_file(file: &File, what: impl Into<String>) -> Violation {
        Violation::in_line(file, 0, what)
    }
}

/// The files of the checkout.
#[derive(Debug, Default)]
struct Tree {
    files: Vec<File>,
    /// Every path, files that are no text included, and folders with a slash at the end.
    paths: Vec<String>,
}

/// A text file.
#[derive(Debug)]
struct File {
    path: String,
    text: String,
    /// Of Rust files, the text with comments and the contents of literals blanked; lines keep their
    /// numbers.
    code: String,
    /// Of Rust files, what the comments say, on the same lines.
    comments: String,
}

impl File {
    fn new(path: String, text: String) -> File {
        let (code, comments) = if path.ends_with(".rs") {
            lexer::split(&text)
        } else {
            (String::new(), String::new())
        };
        File {
            path,
            text,
            code,
            comments,
        }
    }

    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// The code in front of the file's test module.
    fn code_without_tests(&self) -> &str {
        let end = self
            .code
            .find("\n#[cfg(test)]\nmod ")
            .unwrap_or(self.code.len());
        &self.code[..end]
    }
}

impl Tree {
    /// Reads the checkout at `root`.
    fn read(root: &Path) -> Result<Tree, Error> {
        let mut tree = Tree::default();
        tree.walk(root, root)?;
        tree.files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(tree)
    }

    fn walk(&mut self, root: &Path, dir: &Path) -> Result<(), Error> {
        const HIDDEN: [&str; 2] = [".cargo", ".ci"];
        // Built or fetched, never written by hand.
        const LEFT_OUT: [&str; 5] = [
            "target",
            "dist",
            "models/files",
            "__pycache__",
            "node_modules",
        ];
        for entry in dir
            .read_dir()
            .map_err(Error::io("cannot read", dir))?
            .flatten()
        {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let relative = relative(root, &path);
            if (name.starts_with('.') && !HIDDEN.contains(&name.as_str()))
                || LEFT_OUT.contains(&name.as_str())
                || LEFT_OUT.contains(&relative.as_str())
            {
                continue;
            }
            let kind = entry.file_type().map_err(Error::io("cannot read", &path))?;
            if kind.is_dir() {
                self.paths.push(format!("{relative}/"));
                self.walk(root, &path)?;
            } else if kind.is_file() {
                self.paths.push(relative.clone());
                // Files that are not UTF-8 are data.
                if let Ok(text) = fs::read_to_string(&path) {
                    self.files.push(File::new(relative, text));
                }
            }
        }
        Ok(())
    }

    /// A tree made up for a test.
    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Tree {
        Tree {
            files: files
                .iter()
                .map(|(path, text)| File::new((*path).into(), (*text).into()))
                .collect(),
            paths: files.iter().map(|(path, _)| (*path).to_owned()).collect(),
        }
    }

    /// The Rust files below any of `dirs`.
    fn rust_in<'a>(&'a self, dirs: &'a [&str]) -> impl Iterator<Item = &'a File> {
        self.files
            .iter()
            .filter(|file| file.is_rust() && dirs.iter().any(|dir| file.path.starts_with(dir)))
    }
}

fn relative(root: &Path, path: &Path) -> String {
    let relative: PathBuf = path.strip_prefix(root).unwrap_or(path).into();
    relative.to_string_lossy().replace('\\', "/")
}

/// Runs the task.
pub fn run(_: &Args) -> Result<(), Error> {
    let tree = Tree::read(&workspace::root())?;
    let mut broken = 0;
    for rule in rules::RULES {
        let violations = (rule.find)(&tree);
        println!(
            "{:<42} {}",
            rule.name,
            if violations.is_empty() {
                "ok"
            } else {
                "BROKEN"
            }
        );
        if violations.is_empty() {
            continue;
        }
        broken += 1;
        println!("  why: {}", rule.why);
        for Violation { path, line, what } in violations {
            match line {
                0 => println!("  {path}: {what}"),
                line => println!("  {path}:{line}: {what}"),
            }
        }
    }
    match broken {
        0 => Ok(()),
        count => Err(Error::failed(format!(
            "{count} of {} invariants are broken",
            rules::RULES.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkout_is_read() {
        let tree = Tree::read(&workspace::root()).unwrap();
        let paths: Vec<&str> = tree.files.iter().map(|file| file.path.as_str()).collect();
        for expected in [
            "Cargo.toml",
            "xtask/src/main.rs",
            ".ci/run",
            ".cargo/config.toml",
        ] {
            assert!(paths.contains(&expected), "{expected}");
        }
        assert!(
            !paths
                .iter()
                .any(|path| path.starts_with("target/") || path.starts_with(".git/"))
        );
        assert!(tree.paths.iter().any(|path| path == "models/src/"));
    }

    #[test]
    fn test_modules_are_cut_off() {
        let file = File::new(
            "a.rs".into(),
            "fn a() {}\n#[cfg(test)]\nmod tests { fn b() {} }\n".into(),
        );
        assert_eq!(file.code_without_tests(), "fn a() {}");
        let helper = File::new(
            "a.rs".into(),
            "#[cfg(test)]\nfn helper() {}\nfn a() {}\n".into(),
        );
        assert!(helper.code_without_tests().contains("fn a()"));
    }
}
