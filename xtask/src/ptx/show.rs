//! Prints a kernel's code with the Rust lines that it comes from.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Source files, read once.
pub struct Sources {
    root: PathBuf,
    files: HashMap<PathBuf, Vec<String>>,
}

impl Sources {
    /// Sources whose paths are shown from `root`.
    pub fn new(root: &Path) -> Sources {
        Sources {
            root: root.to_owned(),
            files: HashMap::new(),
        }
    }

    /// `// gpu-kernels/src/add.rs:66  let first = …`
    fn comment(&mut self, path: &str, line: usize) -> String {
        let path = Path::new(path);
        let lines = self.files.entry(path.to_owned()).or_insert_with(|| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.lines().map(|line| line.trim().to_owned()).collect()
        });
        let text = line.checked_sub(1).and_then(|index| lines.get(index));
        let text = text.map_or("", String::as_str);
        // Of the library, the crate's part of the path says enough.
        let shown = path
            .strip_prefix(&self.root)
            .unwrap_or(path)
            .to_string_lossy();
        let shown = match shown.split_once("/library/") {
            Some((_, rest)) => rest,
            None => &shown,
        };
        format!("// {shown}:{line}  {text}").trim_end().to_owned()
    }
}

/// The PTX of a kernel, each `.loc` replaced by the line that it names. `ptx` is the whole module:
/// its `.file` directives number the files.
pub fn ptx(kernel: &str, ptx: &str, sources: &mut Sources) -> String {
    let files: HashMap<&str, &str> = ptx
        .lines()
        .filter_map(|line| line.trim().strip_prefix(".file")?.trim().split_once(' '))
        .map(|(number, path)| (number, path.trim().trim_matches('"')))
        .collect();
    let mut text = String::new();
    let mut shown = String::new();
    for line in kernel.lines() {
        let code = line.trim();
        // Labels that only the debug sections would use.
        if code.starts_with("$L__tmp") || code.starts_with("$L__func_") {
            continue;
        }
        let Some(place) = code.strip_prefix(".loc") else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        let mut numbers = place.split_whitespace();
        let path = numbers.next().and_then(|number| files.get(number));
        let row: Option<usize> = numbers.next().and_then(|number| number.parse().ok());
        // Line 0 is code that belongs to no line.
        if let (Some(path), Some(row @ 1..)) = (path, row) {
            add_comment(&mut text, &mut shown, sources.comment(path, row));
        }
    }
    text
}

/// The machine code of a kernel, each file and line that `nvdisasm` names replaced by that line.
pub fn sass(kernel: &str, sources: &mut Sources) -> String {
    let mut text = String::new();
    let mut shown = String::new();
    for line in kernel.lines() {
        match place(line.trim()) {
            Some((path, row)) => add_comment(&mut text, &mut shown, sources.comment(path, row)),
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// `//## File "path", line 12 …`
fn place(line: &str) -> Option<(&str, usize)> {
    let (path, rest) = line.strip_prefix("//## File \"")?.split_once("\", line ")?;
    let row = rest.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((path, row.parse().ok()?))
}

fn add_comment(text: &mut String, shown: &mut String, comment: String) {
    if *shown != comment {
        text.push_str(&format!("\t{comment}\n"));
        *shown = comment;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(folder: &Path) -> Sources {
        fs::create_dir(folder.join("src")).unwrap();
        fs::write(folder.join("src/a.rs"), "one\n    two\n").unwrap();
        Sources::new(folder)
    }

    #[test]
    fn directives_become_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut sources = sources(folder.path());
        let kernel = "{\n\t.loc\t1 2 5\n$L__tmp0:\n\tadd;\n\t.loc\t1 2 9\n\tmul;\n\t.loc\t1 0 9\n\
                      $L__BB0_1:\n\t.loc\t2 468 18\n}\n";
        let module = format!(
            "{kernel}\t.file\t1 \"{}/src/a.rs\"\n\t.file\t2 \"/r/rustlib/src/rust/library/core/src/b.rs\"\n",
            folder.path().display()
        );
        assert_eq!(
            ptx(kernel, &module, &mut sources),
            "{\n\t// src/a.rs:2  two\n\tadd;\n\tmul;\n$L__BB0_1:\n\t// core/src/b.rs:468\n}\n"
        );
    }

    #[test]
    fn places_in_machine_code_become_lines() {
        let folder = tempfile::tempdir().unwrap();
        let mut sources = sources(folder.path());
        let path = folder.path().join("src/a.rs");
        let code = format!(
            "\t//## File \"{0}\", line 1\n  LDC ;\n\t//## File \"{0}\", line 1 inlined at \"x\", line 2\n  EXIT ;\n",
            path.display()
        );
        assert_eq!(
            sass(&code, &mut sources),
            "\t// src/a.rs:1  one\n  LDC ;\n  EXIT ;\n"
        );
        assert_eq!(place("//## File \"a"), None);
    }
}
