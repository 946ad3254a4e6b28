//! Which instruction set the kernels use, chosen at run time.

use std::fmt;
use std::sync::OnceLock;

/// Environment variable that forces an instruction set: one of the names in
/// [`Isa::available`].
pub const OVERRIDE: &str = "EDGELLM_CPU";

/// An instruction set that this CPU has. There is no other way to get one than to ask for those
/// that are available, so holding an `Isa` is the proof that its kernels may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(pub(crate) Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonDotprod,
    #[cfg(target_arch = "aarch64")]
    NeonI8mm,
}

impl Isa {
    /// The instruction sets of this CPU, slowest first; `scalar` is always there.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut, reason = "only x86-64 and AArch64 have more than one")]
        let mut found = vec![Isa(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            found.push(Isa(Kind::Avx2));
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                found.push(Isa(Kind::Avx512));
                if is_x86_feature_detected!("avx512vnni") {
                    found.push(Isa(Kind::Avx512Vnni));
                    if is_x86_feature_detected!("avx512vbmi")
                        && is_x86_feature_detected!("avx512vbmi2")
                    {
                        found.push(Isa(Kind::Avx512Vbmi));
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            found.push(Isa(Kind::Neon));
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                found.push(Isa(Kind::NeonDotprod));
                if std::arch::is_aarch64_feature_detected!("i8mm") {
                    found.push(Isa(Kind::NeonI8mm));
                }
            }
        }
        found
    }

    /// The one called `name`.
    ///
    /// # Errors
    /// A sentence that lists the available ones, if `name` is not among them.
    pub fn named(name: &str) -> Result<Isa, String> {
        let available = Isa::available();
        available
            .iter()
            .copied()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| {
                let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
                format!(
                    "`{name}` is no instruction set of this CPU, which has: {}",
                    names.join(", ")
                )
            })
    }

    /// The instruction set that [`OVERRIDE`] names, else the fastest of this CPU.
    ///
    /// # Errors
    /// If the variable names one that this CPU lacks.
    pub fn from_environment() -> Result<Isa, String> {
        match std::env::var(OVERRIDE) {
            Ok(name) => Isa::named(&name).map_err(|e| format!("{OVERRIDE}: {e}")),
            Err(_) => Ok(*Isa::available().last().expect("scalar is always available")),
        }
    }

    /// [`Isa::from_environment`], asked once a process.
    ///
    /// # Panics
    /// If the variable names an instruction set that this CPU lacks.
    pub fn selected() -> Isa {
        static SELECTED: OnceLock<Isa> = OnceLock::new();
        *SELECTED.get_or_init(|| Isa::from_environment().unwrap_or_else(|e| panic!("{e}")))
    }

    /// The instructions that each operation uses.
    pub fn operations(self) -> [(&'static str, &'static str); 5] {
        let (products, attention, floats) = match self.0 {
            Kind::Scalar => ("i32", "plain loops", "scalar"),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => ("vpmaddubsw", "avx2", "avx2"),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => ("vpmaddubsw, 512 bits", "avx512", "avx512"),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni | Kind::Avx512Vbmi => ("vpdpbusd, 512 bits", "avx512", "avx512"),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => ("smlal", "neon", "compiled for neon"),
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDotprod => ("sdot", "neon", "compiled for neon"),
            #[cfg(target_arch = "aarch64")]
            Kind::NeonI8mm => (
                "sdot; usmmla for several tokens",
                "neon",
                "compiled for neon",
            ),
        };
        [
            ("linear int4, int8, ternary", products),
            ("linear f16", floats),
            ("attention", attention),
            ("softmax, rmsnorm, rope, swiglu, relu2_glu, add", floats),
            ("rounding to levels", floats),
        ]
    }

    /// Name as in [`OVERRIDE`].
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vnni => "avx512-vnni",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vbmi => "avx512-vbmi",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonDotprod => "neon-dotprod",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonI8mm => "neon-i8mm",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Defines `fn name(isa, args…)` that runs `body::<FMA>(args…)`, an `#[inline(always)]` function of
/// plain Rust, compiled once for each instruction set so that the compiler vectorises it for each.
macro_rules! per_isa {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        pub(crate) fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                $body::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                $body::<true>($($arg),*)
            }
            match isa.0 {
                $crate::isa::Kind::Scalar => $body::<false>($($arg),*),
                // SAFETY: an `Isa` only exists for a CPU that has its features.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Kind::Avx512
                | $crate::isa::Kind::Avx512Vnni
                // SAFETY: as above.
                | $crate::isa::Kind::Avx512Vbmi => unsafe { avx512($($arg),*) },
                #[cfg(target_arch = "aarch64")]
                $crate::isa::Kind::Neon
                | $crate::isa::Kind::NeonDotprod
                | $crate::isa::Kind::NeonI8mm => $body::<true>($($arg),*),
            }
        }
    };
}
pub(crate) use per_isa;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_is_always_there_and_names_round_trip() {
        let available = Isa::available();
        assert_eq!(available[0].name(), "scalar");
        for isa in available {
            assert_eq!(Isa::named(isa.name()), Ok(isa));
            assert!(
                isa.operations()
                    .iter()
                    .all(|(op, how)| !op.is_empty() && !how.is_empty())
            );
        }
        let error = Isa::named("sse9").unwrap_err();
        assert!(
            error.contains("sse9") && error.contains("scalar"),
            "{error}"
        );
    }
}
