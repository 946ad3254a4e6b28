//! The kernels to run, as PTX: those that the program was built with, or files.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use engine::Error;
use engine::backend::Tier;
use engine::backend::cuda;
use engine::backend::cuda::device::{self, Gpu};

/// PTX by tier, lowest first.
#[derive(Debug, Clone)]
pub struct Ptx(Vec<(Tier, Cow<'static, str>)>);

impl Ptx {
    /// What the program was built with; nothing where it was built without.
    pub fn embedded() -> Ptx {
        let tiers = cuda::ptx().iter();
        Ptx(tiers
            .map(|(tier, text)| (*tier, Cow::Borrowed(*text)))
            .collect())
    }

    /// The files `sm_75.ptx`, `sm_80.ptx` and so on of a folder, those that there are.
    ///
    /// # Errors
    /// [`Error::Input`] where there is none, or one that is no PTX of its tier.
    pub fn read(folder: &Path) -> Result<Ptx, Error> {
        let mut tiers = Vec::new();
        for tier in Tier::ALL {
            let path = folder.join(format!("{tier}.ptx"));
            if !path.is_file() {
                continue;
            }
            let text = std::fs::read_to_string(&path)
                .map_err(|error| Error::input(format!("{}: {error}", path.display())))?;
            if text.contains('\0') || !text.contains(&format!(".target {tier}\n")) {
                return Err(Error::input(format!(
                    "{} is no PTX for {tier}",
                    path.display()
                )));
            }
            tiers.push((tier, Cow::Owned(text)));
        }
        if tiers.is_empty() {
            return Err(Error::input(format!(
                "{} holds no sm_75.ptx, sm_80.ptx, sm_90.ptx or sm_90a.ptx",
                folder.display()
            )));
        }
        Ok(Ptx(tiers))
    }

    /// The tiers, lowest first.
    pub fn tiers(&self) -> Vec<Tier> {
        self.0.iter().map(|(tier, _)| *tier).collect()
    }

    /// The PTX of a tier.
    ///
    /// # Errors
    /// [`Error::Input`] for a tier that is not among [`Ptx::tiers`].
    pub fn text(&self, tier: Tier) -> Result<&str, Error> {
        let found = self.0.iter().find(|(known, _)| *known == tier);
        found.map(|(_, text)| &**text).ok_or_else(|| {
            let tiers: Vec<String> = self.0.iter().map(|(tier, _)| tier.to_string()).collect();
            Error::input(format!(
                "no kernels for {tier}: there are {}",
                tiers.join(", ")
            ))
        })
    }

    /// The device with the kernels of `tier`, or `None` where it does not run them.
    ///
    /// # Errors
    /// As [`Ptx::text`], and whatever else keeps the device from being opened.
    pub fn open(&self, tier: Tier) -> Result<Option<Arc<Gpu>>, Error> {
        let text = self.text(tier)?;
        if !tier.runs_on(device::capability()?) {
            return Ok(None);
        }
        Gpu::with_kernels(tier, text).map(Some)
    }

    /// The device with the kernels of `tier`, or of the highest tier that it runs.
    ///
    /// # Errors
    /// As [`Ptx::open`]; [`Error::Machine`] for a device that is too old.
    pub fn open_best(&self, tier: Option<Tier>) -> Result<Arc<Gpu>, Error> {
        let capability = device::capability()?;
        let runs = |known: &Tier| known.runs_on(capability);
        let best = tier.or_else(|| self.tiers().into_iter().filter(runs).max());
        best.map(|tier| self.open(tier))
            .transpose()?
            .flatten()
            .ok_or_else(|| {
                Error::machine(format!(
                    "the GPU is sm_{capability}, too old for the kernels"
                ))
            })
    }

    /// Writes each tier as a file, `sm_75.ptx` and so on.
    ///
    /// # Errors
    /// [`Error::Machine`] from the file system.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        for (tier, text) in &self.0 {
            let path = folder.join(format!("{tier}.ptx"));
            std::fs::write(&path, &**text)
                .map_err(|error| Error::machine(format!("writing {}: {error}", path.display())))?;
        }
        Ok(())
    }
}

/// Parameters of the kernel `name` in a PTX, or `None` if it is not there.
pub fn parameters(ptx: &str, name: &str) -> Option<Vec<String>> {
    let (_, after) = ptx.split_once(&format!(".entry {name}("))?;
    let (list, _) = after.split_once(')')?;
    // `.param .u64 .ptr .global .align 1 linear_param_0`: its type is what matters.
    let parameters = list
        .split(',')
        .map(str::trim)
        .filter(|text| !text.is_empty());
    let kind = |text: &str| {
        text.split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    };
    Some(parameters.map(kind).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = ".target sm_80\n.visible .entry gemv(\n\t.param .u64 .ptr .align 1 gemv_param_0,\n\
        \t.param .u32 gemv_param_1\n)\n{\n\tret;\n}\n";

    #[test]
    fn files_come_back() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Ptx::read(folder.path()).is_err(), "an empty folder");
        Ptx(vec![(Tier::SM_80, Cow::Borrowed(TEXT))])
            .write(folder.path())
            .unwrap();
        let ptx = Ptx::read(folder.path()).unwrap();
        assert_eq!(ptx.tiers(), [Tier::SM_80]);
        assert_eq!(ptx.text(Tier::SM_80).unwrap(), TEXT);
        assert_eq!(ptx.text(Tier::SM_90).unwrap_err().exit_code(), 2);
        std::fs::write(folder.path().join("sm_90.ptx"), TEXT).unwrap();
        assert!(Ptx::read(folder.path()).is_err(), "another tier's");
    }

    #[test]
    fn parameters_are_told_by_type() {
        assert_eq!(
            parameters(TEXT, "gemv"),
            Some(vec![".u64".to_owned(), ".u32".to_owned()])
        );
        assert_eq!(parameters(TEXT, "gem"), None);
    }
}
