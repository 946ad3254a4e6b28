//! Compiles the GPU kernels to PTX, one file a tier, and hands them to the CUDA backend.
//!
//! Output: `$OUT_DIR/ptx_tiers.rs`, which defines
//! `pub static TIERS: &[(Tier, &str /* PTX */)]`, lowest tier first.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "ptx")]
    cuda::build_tiers();
}

#[cfg(feature = "ptx")]
mod cuda {
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::{env, fs, process};

    use cuda_builder::{CudaBuilder, Error, TIERS};

    pub fn build_tiers() {
        let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        match compile(&out_dir) {
            Ok(()) => {}
            // One line and the way out: cargo prints it without the build script's other output.
            Err(error @ Error::MissingCore { .. }) => {
                println!("cargo::error={error}");
                println!(
                    "cargo::error=(a build without GPU support needs nothing: `--no-default-features`)"
                );
            }
            Err(error) => {
                eprintln!("{error}");
                process::exit(1);
            }
        }
    }

    fn compile(out_dir: &Path) -> Result<(), Error> {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gpu-kernels");
        let mut table = String::from("pub static TIERS: &[(Tier, &str)] = &[\n");
        for arch in TIERS {
            let ptx = out_dir.join(format!("{arch}.ptx"));
            let output = CudaBuilder::new(&kernels)
                .arch(arch)
                .copy_to(&ptx)
                .build()?;
            output.print_rerun_if_changed();
            let (capability, alone) = (arch.capability(), arch.is_alone());
            writeln!(
                table,
                "    (Tier::new({capability}, {alone}), include_str!({ptx:?})),"
            )
            .expect("a String takes all");
        }
        table.push_str("];\n");
        let path = out_dir.join("ptx_tiers.rs");
        fs::write(&path, table).map_err(Error::io("cannot write", path))
    }
}
