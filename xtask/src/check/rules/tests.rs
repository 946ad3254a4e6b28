//! Each rule with a tree that keeps it and one that breaks it.

use super::*;

/// Paths of the files in which a rule finds something.
fn broken(rule: fn(&Tree) -> Vec<Violation>, files: &[(&str, &str)]) -> Vec<(String, usize)> {
    rule(&Tree::of(files))
        .into_iter()
        .map(|violation| (violation.path, violation.line))
        .collect()
}

fn at(path: &str, line: usize) -> Vec<(String, usize)> {
    vec![(path.to_owned(), line)]
}

#[test]
fn asm_has_one_room() {
    let files = [
        ("gpu-kernels/src/ptx.rs", "fn a() { asm!(\"x\"); }"),
        (
            "gpu-kernels/src/rope.rs",
            "// asm! is elsewhere\nfn a() { \"asm!\"; my_asm!(); }",
        ),
    ];
    assert!(broken(asm_only_in_ptx, &files).is_empty());
    let files = [("engine/src/lib.rs", "\ncore::arch::asm!(\"x\")")];
    assert_eq!(broken(asm_only_in_ptx, &files), at("engine/src/lib.rs", 2));
    assert_eq!(
        broken(
            asm_only_in_ptx,
            &[("gpu-kernels/src/a.rs", "global_asm!(\"\")")]
        )
        .len(),
        1
    );
}

#[test]
fn launching_has_one_room() {
    let files = [
        (
            "engine/src/backend/cuda/launch.rs",
            "cuLaunchKernel(f); cuGraphLaunch(g);",
        ),
        ("engine/cuda-driver/src/lib.rs", "fn cuLaunchKernel() {}"),
        ("engine/src/generate.rs", "relaunch!(); // cuLaunchKernel"),
    ];
    assert!(broken(launches_only_in_launch, &files).is_empty());
    let files = [(
        "engine/src/backend/cuda/mod.rs",
        "a();\nsys::cuLaunchCooperativeKernel(f)",
    )];
    assert_eq!(
        broken(launches_only_in_launch, &files),
        at("engine/src/backend/cuda/mod.rs", 2)
    );
    assert_eq!(
        broken(
            launches_only_in_launch,
            &[("benches/src/a.rs", "launch!(k)")]
        )
        .len(),
        1
    );
}

#[test]
fn models_is_pure_data() {
    let files = [
        (
            "models/src/lib.rs",
            "//! no gpu\nuse std::fmt;\nconst A: &str = \"cuda\";",
        ),
        ("engine/src/lib.rs", "use std::thread; fn cuda() {}"),
    ];
    assert!(broken(models_names_no_device, &files).is_empty());
    for line in [
        "use std::thread;",
        "fn upload_to_gpu() {}",
        "struct CudaWeights;",
        "use rayon::prelude::*;",
    ] {
        assert_eq!(
            broken(
                models_names_no_device,
                &[("models/src/quant/int4.rs", line)]
            )
            .len(),
            1,
            "{line}"
        );
    }
}

#[test]
fn arrows_point_one_way() {
    let engine = "[package]\nname = \"engine\"\n[dependencies]\nmodels.workspace = true\nserde = \"1\"\n\
                  [build-dependencies]\ncuda_builder.workspace = true\n[dev-dependencies]\nbenches.path = \"b\"\n";
    assert!(broken(dependencies_go_one_way, &[("engine/Cargo.toml", engine)]).is_empty());

    let models = "[package]\nname = \"models\"\n[target.'cfg(unix)'.dependencies]\nengine.path = \"../engine\"\n";
    assert_eq!(
        broken(dependencies_go_one_way, &[("models/Cargo.toml", models)]),
        at("models/Cargo.toml", 0)
    );
    let stranger = "[package]\nname = \"stranger\"\n";
    assert_eq!(
        broken(
            dependencies_go_one_way,
            &[("stranger/Cargo.toml", stranger)]
        )
        .len(),
        1
    );
    assert!(
        broken(
            dependencies_go_one_way,
            &[("a/tests/b/Cargo.toml", stranger)]
        )
        .is_empty(),
        "a fixture"
    );
}

#[test]
fn kernel_crates_stay_inside() {
    let files = [
        (
            "cpu-kernels/src/rope.rs",
            "fn a() {}\n#[cfg(test)]\nmod tests { use std::fs; }\n",
        ),
        ("engine/src/weights.rs", "use std::fs::File;"),
        ("gpu-kernels/src/a.rs", "let buffs::X = 1;"),
    ];
    assert!(broken(kernels_open_no_files, &files).is_empty());
    let files = [("gpu-kernels/src/a.rs", "fn a() { std::fs::read(\"x\"); }")];
    assert_eq!(
        broken(kernels_open_no_files, &files),
        at("gpu-kernels/src/a.rs", 1)
    );
    assert_eq!(
        broken(
            kernels_open_no_files,
            &[("cpu-kernels/src/a.rs", "File::open(p)")]
        )
        .len(),
        1
    );
}

#[test]
fn references_are_found_by_name() {
    let kernel = "#[kernel]\npub fn k() {}";
    let reference = "pub fn reference() {}";
    let files = [
        ("gpu-kernels/src/rope.rs", kernel),
        ("gpu-kernels/src/linear/gemv.rs", kernel),
        ("gpu-kernels/src/launch.rs", "pub struct Launch;"),
        ("cpu-kernels/src/rope.rs", reference),
        ("cpu-kernels/src/linear/int4.rs", reference),
    ];
    assert!(broken(every_gpu_op_has_a_reference, &files).is_empty());
    let files = [
        ("gpu-kernels/src/rope.rs", kernel),
        ("cpu-kernels/src/rope.rs", "pub fn forward() {}"),
    ];
    assert_eq!(
        broken(every_gpu_op_has_a_reference, &files),
        at("gpu-kernels/src/rope.rs", 0)
    );
    assert_eq!(
        broken(
            every_gpu_op_has_a_reference,
            &[("gpu-kernels/src/rope.rs", kernel)]
        )
        .len(),
        1
    );
}

#[test]
fn kernels_read_through_accessors() {
    let good = "#[kernel]\nfn k() { let y = ld_global_f32(x.add(1)); let n = a * b.add(1); }";
    assert!(broken(kernels_use_accessors, &[("gpu-kernels/src/a.rs", good)]).is_empty());
    for line in [
        "let y = *x.add(i);",
        "*y.add(i) = 1.0;",
        "x.add(i).read()",
        "core::slice::from_raw_parts(x, 4);",
    ] {
        let text = format!("#[kernel]\n{line}");
        let found = broken(kernels_use_accessors, &[("gpu-kernels/src/a.rs", &text)]);
        assert_eq!(found, at("gpu-kernels/src/a.rs", 2), "{line}");
        assert!(
            broken(kernels_use_accessors, &[("gpu-kernels/src/ptx.rs", line)]).is_empty(),
            "no kernel"
        );
    }
}

#[test]
fn long_files_are_noticed() {
    let long = "\n".repeat(MAX_LINES + 1);
    assert!(broken(files_stay_short, &[("a.rs", &long[1..]), ("a.md", &long)]).is_empty());
    assert_eq!(broken(files_stay_short, &[("a.rs", &long)]), at("a.rs", 0));
}

#[test]
fn documents_tell_the_truth() {
    let text = "See `engine/src/main.rs`, `src/main.rs` and `models/files/a.json`.\nRun `a/b.rs --x` or `<gpu>/x.rs`.";
    let files = [("engine/README.md", text), ("engine/src/main.rs", "")];
    assert!(broken(documents_name_existing_files, &files).is_empty());
    let files = [("README.md", "one\n`a` and `engine/src/gone.rs`")];
    assert_eq!(
        broken(documents_name_existing_files, &files),
        at("README.md", 2)
    );
}

#[test]
fn unfinished_work_is_noticed() {
    let files = [("a.rs", "const TODO: &str = \"FIXME\"; // the todo list")];
    assert!(broken(no_unfinished_work, &files).is_empty());
    assert_eq!(
        broken(no_unfinished_work, &[("a.rs", "fn a() {}\n// TODO: b")]),
        at("a.rs", 2)
    );
}
