//! The kernels of another revision.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cuda_builder::{CudaBuilder, NvvmArch};

use crate::{Error, workspace};

/// A revision that git knows, and where its kernels are kept.
#[derive(Debug)]
pub struct Revision {
    /// As results record it.
    pub commit: String,
    folder: PathBuf,
}

impl Revision {
    /// What git calls the revision.
    ///
    /// # Errors
    /// [`Error::Usage`] if git does not know it.
    pub fn find(name: &str) -> Result<Revision, Error> {
        let output = git(&["rev-parse", "--verify", "--short=12"])
            .arg(format!("{name}^{{commit}}"))
            .output()
            .map_err(Error::io("cannot run", "git"))?;
        if !output.status.success() {
            return Err(Error::Usage(format!(
                "`{name}` is neither `baseline` nor a revision that git knows"
            )));
        }
        let commit = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let folder = workspace::target_dir()?.join("compare").join(&commit);
        Ok(Revision { commit, folder })
    }

    fn file(&self, tier: NvvmArch) -> PathBuf {
        self.folder.join(format!("{tier}.ptx"))
    }

    /// Compiles the kernels for the tiers, those that no earlier run compiled, from a checkout of the
    /// revision that is removed again. Returns the folder of `sm_75.ptx` and so on.
    ///
    /// # Errors
    /// git or the compiler fails: the revision may be older than the kernels, or its compiler.
    pub fn kernels(&self, tiers: &[NvvmArch]) -> Result<&Path, Error> {
        let missing: Vec<NvvmArch> = tiers
            .iter()
            .copied()
            .filter(|tier| !self.file(*tier).is_file())
            .collect();
        if missing.is_empty() {
            return Ok(&self.folder);
        }
        fs::create_dir_all(&self.folder).map_err(Error::io("cannot make", &self.folder))?;
        let tree = self.folder.join("tree");
        if tree.exists() {
            remove(&tree)?;
        }
        run(git(&["worktree", "add", "--quiet", "--force", "--detach"])
            .arg(&tree)
            .arg(&self.commit))?;
        let built = missing.iter().try_for_each(|tier| {
            eprintln!("compiling the kernels of {} for {tier}", self.commit);
            CudaBuilder::new(tree.join("gpu-kernels"))
                .arch(*tier)
                // Apart from the present kernels, which cargo would take for the same package.
                .target_dir(workspace::target_dir()?.join("cuda-compare"))
                .copy_to(self.file(*tier))
                .build()?;
            Ok(())
        });
        remove(&tree)?;
        built.map(|()| self.folder.as_path())
    }
}

fn remove(tree: &Path) -> Result<(), Error> {
    run(git(&["worktree", "remove", "--force"]).arg(tree))
}

fn git(arguments: &[&str]) -> Command {
    let mut command = Command::new("git");
    command.args(arguments).current_dir(workspace::root());
    command
}

fn run(command: &mut Command) -> Result<(), Error> {
    let output = command.output().map_err(Error::io("cannot run", "git"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Error::failed(format!("git: {}", text.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_are_named_as_they_are_recorded() {
        let error = Revision::find("no such revision").unwrap_err();
        assert_eq!(error.exit_code(), 2);
    }
}
