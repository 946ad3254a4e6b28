//! Builds small kernel crates for the device. Needs what `cargo xtask setup` installs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use cuda_builder::ptxas::Ptxas;
use cuda_builder::{BuildOutput, CudaBuilder, Error, NvvmArch, TIERS, entries};

fn crate_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/kernels")
        .join(name)
}

/// The folder that the engine's build uses too, so that `core` is built once.
fn target_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target folder")
        .join("cuda")
}

fn build(name: &str, arch: NvvmArch) -> Result<BuildOutput, Error> {
    CudaBuilder::new(crate_dir(name))
        .arch(arch)
        .target_dir(target_dir())
        .build()
}

#[test]
fn every_tier_names_its_target_and_version() {
    for arch in TIERS {
        let output = build("good", arch).unwrap();
        let ptx = fs::read_to_string(&output.ptx).unwrap();
        assert_eq!(entries(&ptx), ["pick"], "{ptx}");
        assert!(ptx.contains(&format!(".target {arch}\n")), "{ptx}");
        let version = arch.ptx_version();
        assert!(
            ptx.contains(&format!(".version {}.{}\n", version / 10, version % 10)),
            "{ptx}"
        );
        // The failed bounds check ends the thread; it calls nothing.
        assert!(ptx.contains("trap"), "{ptx}");
        assert!(
            output
                .sources
                .iter()
                .any(|path| path.ends_with("good/src/lib.rs")),
            "{:?}",
            output.sources
        );
        assert!(
            output
                .sources
                .iter()
                .any(|path| path.ends_with("good/Cargo.toml")),
            "{:?}",
            output.sources
        );
        assert!(
            output.sources.iter().all(|path| path.exists()),
            "{:?}",
            output.sources
        );
    }
}

#[test]
fn a_compile_error_shows_rustcs_own_message() {
    let error = build("broken", NvvmArch::Compute75).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Compile {
                arch: NvvmArch::Compute75,
                ..
            }
        ),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("mismatched types") && text.contains("src/lib.rs:6"),
        "{text}"
    );
}

#[test]
fn a_missing_crate_is_a_clear_error() {
    let error = build("absent", NvvmArch::Compute75)
        .unwrap_err()
        .to_string();
    assert!(error.contains("absent/Cargo.toml"), "{error}");
}

#[test]
fn deleted_ptx_is_made_again_and_an_unchanged_copy_left_alone() {
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pick.ptx");
    let builder = CudaBuilder::new(crate_dir("good"))
        .arch(NvvmArch::Compute89)
        .target_dir(
            Path::new(env!("CARGO_TARGET_TMPDIR"))
                .parent()
                .unwrap()
                .join("cuda"),
        );
    let ptx = builder.build().unwrap().ptx;
    fs::remove_file(&ptx).unwrap();
    let output = builder.clone().copy_to(&copy).build().unwrap();
    assert_eq!(output.ptx, copy);
    assert_eq!(fs::read(&ptx).unwrap(), fs::read(&copy).unwrap());

    let modified = |path: &Path| -> SystemTime { fs::metadata(path).unwrap().modified().unwrap() };
    let before = modified(&copy);
    builder.copy_to(&copy).build().unwrap();
    assert_eq!(modified(&copy), before);
}

#[test]
fn ptxas_reports_and_rejects() {
    let Some(ptxas) = Ptxas::find() else {
        println!("skipped: no ptxas");
        return;
    };
    let output = build("good", NvvmArch::Compute75).unwrap();
    let figures = ptxas.figures(&output.ptx, NvvmArch::Compute75).unwrap();
    assert_eq!(figures.len(), 1);
    assert_eq!(figures[0].kernel, "pick");
    assert!(
        figures[0].registers > 0 && !figures[0].uses_local_memory(),
        "{}",
        figures[0]
    );

    let spoiled = Path::new(env!("CARGO_TARGET_TMPDIR")).join("spoiled.ptx");
    fs::write(
        &spoiled,
        fs::read_to_string(&output.ptx)
            .unwrap()
            .replace("trap", "tarp"),
    )
    .unwrap();
    let error = ptxas
        .figures(&spoiled, NvvmArch::Compute75)
        .unwrap_err()
        .to_string();
    assert!(error.contains("tarp"), "{error}");
}
