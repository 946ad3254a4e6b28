//! The rules.

use std::collections::BTreeSet;

use super::lexer::words;
use super::{File, Rule, Tree, Violation};

/// All of them, in the order in which they are shown.
pub(super) const RULES: &[Rule] = &[
    Rule {
        name: "asm! only in ptx.rs and sdot.rs",
        why: "every instruction has a named wrapper with a host twin, so that kernels run under the emulator",
        find: asm_only_in_ptx,
    },
    Rule {
        name: "kernels are launched only in launch.rs",
        why: "one place that launches is one place that checks the launch",
        find: launches_only_in_launch,
    },
    Rule {
        name: "models names no device",
        why: "models is pure data: no device, no threads, no network",
        find: models_names_no_device,
    },
    Rule {
        name: "dependencies go one way",
        why: "models <- cpu-kernels, gpu-kernels <- engine <- benches; an arrow back makes a knot",
        find: dependencies_go_one_way,
    },
    Rule {
        name: "kernel crates open no files",
        why: "kernels compute; only the engine talks to the outside",
        find: kernels_open_no_files,
    },
    Rule {
        name: "every gpu op has a cpu reference",
        why: "a GPU kernel is right when it agrees with the naive reference of the same name",
        find: every_gpu_op_has_a_reference,
    },
    Rule {
        name: "kernels touch memory through accessors",
        why: "accessors name space, width and cache hint, and are checked under the emulator",
        find: kernels_use_accessors,
    },
    Rule {
        name: "files stay short",
        why: "a file is read in one go; split it by what its parts do",
        find: files_stay_short,
    },
    Rule {
        name: "documents name files that exist",
        why: "a path that is gone sends the reader astray",
        find: documents_name_existing_files,
    },
    Rule {
        name: "no unfinished work in comments",
        why: "what is to be done belongs into the issue tracker",
        find: no_unfinished_work,
    },
];

/// More lines than this need a split.
const MAX_LINES: usize = 700;

/// What each crate of the workspace may depend on, of the workspace.
const DEPENDENCIES: [(&str, &[&str]); 11] = [
    ("models", &[]),
    ("cpu-kernels", &["models"]),
    ("cuda_std_macros", &[]),
    ("cuda_std", &["cuda_std_macros"]),
    ("gpu-kernels", &["models", "cpu-kernels", "cuda_std"]),
    ("cuda_builder", &[]),
    ("cuda-driver", &[]),
    (
        "engine",
        &[
            "models",
            "cpu-kernels",
            "gpu-kernels",
            "cuda-driver",
            "cuda_builder",
        ],
    ),
    (
        "benches",
        &[
            "models",
            "cpu-kernels",
            "gpu-kernels",
            "engine",
            "cuda-driver",
        ],
    ),
    ("fuzz", &["models", "engine"]),
    ("xtask", &["models", "cuda_builder"]),
];

fn asm_only_in_ptx(tree: &Tree) -> Vec<Violation> {
    // An instruction of AArch64 that has no stable intrinsic yet.
    let rooms = ["ptx.rs", "sdot.rs"];
    let outside = tree
        .rust_in(&[""])
        .filter(|file| !rooms.contains(&file.name()));
    find_lines(
        outside,
        |file| &file.code,
        |line| {
            ["asm!", "global_asm!", "naked_asm!"]
                .into_iter()
                .find(|call| is_word_in(line, call))
                .map(|call| {
                    format!(
                        "`{call}` belongs into ptx.rs, behind a wrapper named after the instruction"
                    )
                })
        },
    )
}

fn launches_only_in_launch(tree: &Tree) -> Vec<Violation> {
    // The driver crate defines the symbols.
    let outside = tree
        .rust_in(&[
            "engine/",
            "benches/",
            "gpu-kernels/",
            "cpu-kernels/",
            "models/",
        ])
        .filter(|file| file.name() != "launch.rs" && !file.path.starts_with("engine/cuda-driver/"));
    find_lines(
        outside,
        |file| &file.code,
        |line| {
            let call = words(line)
                .map(|(_, word)| word)
                .find(|word| word.starts_with("cuLaunch") || word.starts_with("cuGraphLaunch"));
            let call = call.or_else(|| is_word_in(line, "launch!").then_some("launch!"))?;
            Some(format!(
                "`{call}` belongs into engine/src/backend/cuda/launch.rs"
            ))
        },
    )
}

fn models_names_no_device(tree: &Tree) -> Vec<Violation> {
    const PARTS: [&str; 4] = ["cuda", "nvptx", "gpu", "ptx"];
    const WORDS: [&str; 10] = [
        "cust",
        "rayon",
        "thread",
        "TcpStream",
        "reqwest",
        "target_feature",
        "is_x86_feature_detected",
        "avx2",
        "avx512",
        "neon",
    ];
    find_lines(
        tree.rust_in(&["models/src/"]),
        |file| &file.code,
        |line| {
            let (_, word) = words(line).find(|(_, word)| {
                let lower = word.to_ascii_lowercase();
                PARTS.iter().any(|part| lower.contains(part)) || WORDS.contains(word)
            })?;
            Some(format!("`{word}`: say it in engine or in a kernel crate"))
        },
    )
}

fn dependencies_go_one_way(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in tree
        .files
        .iter()
        .filter(|file| is_member_manifest(&file.path))
    {
        let manifest: toml::Table = match file.text.parse() {
            Ok(manifest) => manifest,
            Err(error) => {
                violations.push(Violation::in_file(
                    file,
                    format!("not TOML: {}", error.message()),
                ));
                continue;
            }
        };
        let Some(name) = manifest
            .get("package")
            .and_then(|package| package.get("name")?.as_str())
        else {
            continue;
        };
        let Some((_, allowed)) = DEPENDENCIES.iter().find(|(member, _)| *member == name) else {
            violations.push(Violation::in_file(
                file,
                format!("crate `{name}` is in no row of the rule's table"),
            ));
            continue;
        };
        for dependency in dependencies(&manifest) {
            let of_workspace = DEPENDENCIES.iter().any(|(member, _)| *member == dependency);
            if of_workspace && !allowed.contains(&dependency.as_str()) {
                violations.push(Violation::in_file(
                    file,
                    format!("`{name}` must not depend on `{dependency}`"),
                ));
            }
        }
    }
    violations
}

/// A manifest of this workspace, not of a test's fixture.
fn is_member_manifest(path: &str) -> bool {
    path.ends_with("/Cargo.toml") && !path.contains("/tests/")
}

/// Names in every `dependencies` and `build-dependencies` table; tests may use anything.
fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (key, value) in manifest {
        let Some(table) = value.as_table() else {
            continue;
        };
        match key.as_str() {
            "dependencies" | "build-dependencies" => names.extend(table.keys().cloned()),
            "target" => {
                for target in table.values().filter_map(toml::Value::as_table) {
                    names.extend(dependencies(target));
                }
            }
            _ => {}
        }
    }
    names
}

fn kernels_open_no_files(tree: &Tree) -> Vec<Violation> {
    const PATHS: [&str; 6] = [
        "std::fs",
        "fs::",
        "File::",
        "std::net",
        "std::process",
        "std::io::",
    ];
    // The macros run in the compiler, cuda_builder is a build tool.
    let kernels = tree.rust_in(&[
        "cpu-kernels/src/",
        "gpu-kernels/src/",
        "gpu-kernels/cuda_std/src/",
    ]);
    find_lines(kernels, File::code_without_tests, |line| {
        let path = PATHS.into_iter().find(|path| is_word_in(line, path))?;
        Some(format!("`{path}`: let the engine read it and pass bytes"))
    })
}

fn every_gpu_op_has_a_reference(tree: &Tree) -> Vec<Violation> {
    let references: BTreeSet<&str> = tree
        .rust_in(&["cpu-kernels/src/"])
        .filter(|file| words(&file.code).any(|(_, word)| word == "reference"))
        .filter_map(|file| op_of(&file.path, "cpu-kernels/src/"))
        .collect();
    kernel_files(tree)
        .filter_map(|file| {
            let op = op_of(&file.path, "gpu-kernels/src/")?;
            (!references.contains(op)).then(|| {
                Violation::in_file(file, format!("no `fn reference` in cpu-kernels/src/{op}.rs or below cpu-kernels/src/{op}/"))
            })
        })
        .collect()
}

/// `gpu-kernels/src/linear/gemv.rs` -> `linear`, `gpu-kernels/src/rope.rs` -> `rope`.
fn op_of<'a>(path: &'a str, source: &str) -> Option<&'a str> {
    let first = path.strip_prefix(source)?.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first))
}

/// The files that hold kernels.
fn kernel_files(tree: &Tree) -> impl Iterator<Item = &File> {
    tree.rust_in(&["gpu-kernels/src/"])
        .filter(|file| file.code.contains("#[kernel]") || file.code.contains("#[cuda_std::kernel]"))
}

fn kernels_use_accessors(tree: &Tree) -> Vec<Violation> {
    const CALLS: [&str; 5] = [
        "read_volatile",
        "write_volatile",
        "from_raw_parts",
        "from_raw_parts_mut",
        "copy_nonoverlapping",
    ];
    find_lines(kernel_files(tree), File::code_without_tests, |line| {
        if let Some((_, call)) = words(line).find(|(_, word)| CALLS.contains(word)) {
            return Some(format!("`{call}`: use an accessor of ptx.rs"));
        }
        let direct = [".read()", ".write("]
            .into_iter()
            .find(|call| line.contains(call));
        let direct = direct.or_else(|| dereferences_offset(line).then_some("*pointer.add(…)"))?;
        Some(format!("`{direct}`: use an accessor of ptx.rs"))
    })
}

/// Whether the line holds `*name.add(`.
fn dereferences_offset(line: &str) -> bool {
    line.match_indices(".add(").any(|(at, _)| {
        let before = &line[..at];
        let name = before
            .trim_end_matches(|character: char| character.is_alphanumeric() || character == '_');
        // `a * p.add(` is a product: there is a value in front of the star.
        name.len() < before.len()
            && name.strip_suffix('*').is_some_and(|rest| {
                !rest
                    .trim_end()
                    .ends_with(|c: char| c.is_alphanumeric() || matches!(c, ')' | ']' | '_'))
            })
    })
}

fn files_stay_short(tree: &Tree) -> Vec<Violation> {
    tree.rust_in(&[""])
        .filter_map(|file| {
            let lines = file.text.lines().count();
            (lines > MAX_LINES)
                .then(|| Violation::in_file(file, format!("{lines} lines, at most {MAX_LINES}")))
        })
        .collect()
}

fn documents_name_existing_files(tree: &Tree) -> Vec<Violation> {
    let documents = tree.files.iter().filter(|file| file.path.ends_with(".md"));
    let mut violations = Vec::new();
    for file in documents {
        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (index, line) in file.text.lines().enumerate() {
            // Every second piece lies between backticks.
            for quoted in line
                .split('`')
                .skip(1)
                .step_by(2)
                .filter(|quoted| is_path(quoted))
            {
                let exists = |path: &str| {
                    tree.paths
                        .iter()
                        .any(|known| known == path || known.strip_suffix('/') == Some(path))
                };
                if !exists(quoted)
                    && !exists(quoted.trim_end_matches('/'))
                    && !exists(&format!("{folder}/{quoted}"))
                {
                    violations.push(Violation::in_line(
                        file,
                        index + 1,
                        format!("`{quoted}` does not exist"),
                    ));
                }
            }
        }
    }
    violations
}

/// Whether quoted text is a path of this checkout: it has a slash and a source file's ending. Paths
/// that the build or a download makes, and patterns, are not.
fn is_path(quoted: &str) -> bool {
    const ENDINGS: [&str; 7] = [".rs", ".toml", ".md", ".sh", ".py", ".jsonl", ".json"];
    const MADE: [&str; 3] = ["target/", "dist/", "models/files/"];
    quoted.contains('/')
        && ENDINGS.iter().any(|ending| quoted.ends_with(ending))
        && !MADE.iter().any(|made| quoted.starts_with(made))
        && quoted
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-'))
        && !quoted.starts_with(['/', '.'])
}

fn no_unfinished_work(tree: &Tree) -> Vec<Violation> {
    const MARKS: [&str; 4] = ["TODO", "FIXME", "XXX", "HACK"];
    find_lines(
        tree.rust_in(&[""]),
        |file| &file.comments,
        |line| {
            let (_, mark) = words(line).find(|(_, word)| MARKS.contains(word))?;
            Some(format!("`{mark}`"))
        },
    )
}

/// Applies `find` to each line of a part of each file.
fn find_lines<'a>(
    files: impl Iterator<Item = &'a File>,
    part: impl Fn(&'a File) -> &'a str,
    find: impl Fn(&str) -> Option<String>,
) -> Vec<Violation> {
    let mut violations = Vec::new();
    for file in files {
        for (index, line) in part(file).lines().enumerate() {
            violations.extend(find(line).map(|what| Violation::in_line(file, index + 1, what)));
        }
    }
    violations
}

/// Whether `text` occurs in the line, not as the end of a longer word.
fn is_word_in(line: &str, text: &str) -> bool {
    line.match_indices(text).any(|(at, _)| {
        !line[..at].ends_with(|character: char| character.is_alphanumeric() || character == '_')
    })
}

#[cfg(test)]
mod tests;
