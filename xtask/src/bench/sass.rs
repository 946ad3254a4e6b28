//! Reads machine code as `nvdisasm` prints it: what kinds of instructions a kernel is made of, and
//! what its main loop loads.

use std::collections::BTreeMap;

/// The instructions of one kernel.
#[derive(Debug, Default, PartialEq)]
pub struct Kernel {
    /// Entry name.
    pub name: String,
    instructions: Vec<Instruction>,
    /// Index of the first instruction behind each label.
    labels: BTreeMap<String, usize>,
}

#[derive(Debug, PartialEq)]
struct Instruction {
    /// As in `LDG.E.NA.128.CONSTANT`.
    opcode: String,
    /// Label that it may jump to.
    target: Option<String>,
}

/// What a stretch of code is made of.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Mix {
    /// Instructions.
    pub instructions: usize,
    /// Of each kind, the most frequent first.
    pub kinds: Vec<(&'static str, usize)>,
    /// Bytes that one thread loads from global memory.
    pub load_bytes: usize,
    /// Of those, in 16-byte loads and copies to shared memory that leave the L1 alone: weights.
    pub weight_bytes: usize,
}

/// Splits the disassembly of a cubin into its kernels.
pub fn parse(text: &str) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in text.lines() {
        let code = line.trim();
        if let Some(name) = line
            .strip_prefix(".text.")
            .and_then(|rest| rest.strip_suffix(':'))
        {
            kernels.push(Kernel {
                name: name.to_owned(),
                ..Kernel::default()
            });
            continue;
        }
        let Some(kernel) = kernels.last_mut() else {
            continue;
        };
        if let Some(label) = code
            .strip_suffix(':')
            .filter(|label| label.starts_with(".L"))
        {
            kernel
                .labels
                .insert(label.to_owned(), kernel.instructions.len());
        } else if let Some(instruction) = instruction(code) {
            kernel.instructions.push(instruction);
        }
    }
    kernels
}

/// Reads `/*0230*/ @P0 BRA `(.L_x_38) ;`.
fn instruction(code: &str) -> Option<Instruction> {
    let (address, rest) = code.strip_prefix("/*")?.split_once("*/")?;
    u64::from_str_radix(address, 16).ok()?;
    let mut words = rest.split_whitespace();
    let mut opcode = words.next()?;
    if opcode.starts_with('@') {
        opcode = words.next()?;
    }
    let target = rest
        .split_once("`(")
        .and_then(|(_, rest)| rest.split_once(')'))
        .map(|(label, _)| label.to_owned());
    Some(Instruction {
        opcode: opcode.trim_end_matches(';').to_owned(),
        target: target.filter(|_| opcode.starts_with("BRA")),
    })
}

/// The kind of an instruction.
fn kind(opcode: &str) -> &'static str {
    let base = opcode.split('.').next().unwrap_or(opcode);
    match base {
        "LDG" | "LD" | "LDGSTS" | "UBLKCP" | "UTMALDG" => "global load",
        "STG" | "ST" => "global store",
        "RED" | "REDG" | "ATOM" | "ATOMG" | "ATOMS" => "atomic",
        "LDS" | "LDSM" => "shared load",
        "STS" | "STSM" => "shared store",
        "LDL" | "STL" => "local",
        "LDC" | "ULDC" | "LDCU" => "constant",
        "HMMA" | "IMMA" | "QMMA" | "HGMMA" | "IGMMA" | "QGMMA" => "matrix",
        // Two of the ways in which ptxas writes a constant or copies a register.
        "HFMA2" if opcode.starts_with("HFMA2.MMA") => "move",
        "IMAD" if opcode.starts_with("IMAD.MOV") => "move",
        "MOV" | "UMOV" | "S2R" | "S2UR" | "CS2R" | "R2UR" | "SEL" | "P2R" | "R2P" | "PLOP3"
        | "PRMT" | "UPRMT" => "move",
        "HFMA2" | "HADD2" | "HMUL2" | "HSETP2" | "HSET2" | "HMNMX2" => "half",
        "FFMA" | "FADD" | "FMUL" | "FMNMX" | "FSEL" | "FSETP" | "FSET" | "FCHK" | "FFMA2" => {
            "float"
        }
        "MUFU" => "special",
        "I2F" | "F2I" | "F2F" | "I2FP" | "F2FP" | "I2I" | "FRND" => "convert",
        "SHFL" | "VOTE" | "VOTEU" | "MATCH" | "REDUX" => "warp",
        "BAR" | "WARPSYNC" | "MEMBAR" | "ERRBAR" | "CCTL" | "DEPBAR" | "LDGDEPBAR" | "BSSY"
        | "BSYNC" | "YIELD" | "NANOSLEEP" | "SYNCS" | "ACQBULK" => "wait",
        "BRA" | "EXIT" | "CALL" | "RET" | "BRX" | "JMP" | "BREAK" | "NOP" => "branch",
        _ => "integer",
    }
}

/// Bytes that a load moves for one thread.
fn load_bytes(opcode: &str) -> usize {
    let width = opcode.split('.').find_map(|part| match part {
        "256" => Some(32),
        "128" => Some(16),
        "64" => Some(8),
        "U16" | "S16" => Some(2),
        "U8" | "S8" => Some(1),
        _ => None,
    });
    width.unwrap_or(4)
}

impl Mix {
    fn of(instructions: &[Instruction]) -> Mix {
        let mut kinds: BTreeMap<&'static str, usize> = BTreeMap::new();
        let mut mix = Mix {
            instructions: instructions.len(),
            ..Mix::default()
        };
        for instruction in instructions {
            let kind = kind(&instruction.opcode);
            *kinds.entry(kind).or_default() += 1;
            if kind == "global load" {
                let bytes = load_bytes(&instruction.opcode);
                mix.load_bytes += bytes;
                let mut parts = instruction.opcode.split('.');
                if bytes >= 16 && parts.any(|part| part == "NA" || part == "BYPASS") {
                    mix.weight_bytes += bytes;
                }
            }
        }
        mix.kinds = kinds.into_iter().collect();
        mix.kinds
            .sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        mix
    }

    /// `integer 45%, float 30%, …`: the kinds that make up at least a twentieth.
    pub fn shares(&self) -> String {
        let percent =
            |count: usize| (100 * count + self.instructions / 2) / self.instructions.max(1);
        let shown = self.kinds.iter().filter(|(_, count)| percent(*count) >= 5);
        let words: Vec<String> = shown
            .map(|(kind, count)| format!("{kind} {}%", percent(*count)))
            .collect();
        words.join(", ")
    }
}

impl Kernel {
    /// All of the kernel, without the padding behind it.
    pub fn mix(&self) -> Mix {
        let padding = |instruction: &Instruction| instruction.opcode == "NOP";
        let end = self
            .instructions
            .iter()
            .rposition(|instruction| !padding(instruction))
            .map_or(0, |last| last + 1);
        Mix::of(&self.instructions[..end])
    }

    /// The loop that loads most weights, or, in a kernel without any in a loop, most bytes from
    /// global memory, and holds no other that does; `None` where no loop loads.
    pub fn main_loop(&self) -> Option<Mix> {
        let loops: Vec<(usize, usize)> = self
            .instructions
            .iter()
            .enumerate()
            .filter_map(|(index, instruction)| {
                let start = *self.labels.get(instruction.target.as_ref()?)?;
                (start <= index).then_some((start, index + 1))
            })
            .collect();
        let mix = |(start, end): (usize, usize)| Mix::of(&self.instructions[start..end]);
        let weights = loops.iter().any(|of| mix(*of).weight_bytes > 0);
        let bytes = |mix: &Mix| match weights {
            true => mix.weight_bytes,
            false => mix.load_bytes,
        };
        let inner = loops.iter().filter(|outer| {
            !loops.iter().any(|other| {
                other != *outer
                    && outer.0 <= other.0
                    && other.1 <= outer.1
                    && bytes(&mix(*other)) > 0
            })
        });
        inner
            .map(|of| mix(*of))
            .filter(|mix| bytes(mix) > 0)
            // The first of equals: the form that ptxas expects to run.
            .min_by_key(|mix| std::cmp::Reverse(bytes(mix)))
    }
}

/// The lines of one kernel, its name first.
pub fn text<'a>(sass: &'a str, kernel: &str) -> Option<&'a str> {
    let start = sass.find(&format!("\n.text.{kernel}:\n"))? + 1;
    let rest = &sass[start..];
    let end = rest.find("\n//----").map_or(rest.len(), |end| end + 1);
    Some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of nvdisasm 13.5 for two kernels of this workspace.
    const SASS: &str = "\
\t.target\tsm_90

//--------------------- .text.rmsnorm_f32         --------------------------
\t.section\t.text.rmsnorm_f32,\"ax\",@progbits
        .type           rmsnorm_f32,@function
rmsnorm_f32:
.text.rmsnorm_f32:
\t//## File \"/w/gpu-kernels/src/rmsnorm.rs\", line 86
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R9, SR_TID.X ;
        /*0070*/                   HFMA2.MMA R11, -RZ, RZ, 0, 0 ;
        /*0150*/               @P0 BRA `(.L_x_8) ;
.L_x_9:
\t//## File \"/w/gpu-kernels/src/ptx.rs\", line 128
        /*0190*/                   LDG.E.128 R4, desc[UR6][R4.64] ;
        /*01a0*/                   LEA R15, R0, R15, 0x2 ;
        /*01c0*/                   FFMA R8, R4, R4, R11 ;
        /*01f0*/                   FFMA R11, R7, R7, R6 ;
        /*0200*/              @!P1 BRA `(.L_x_9) ;
.L_x_8:
        /*0210*/                   EXIT ;
.L_x_10:
        /*0220*/                   BRA `(.L_x_10);
        /*0230*/                   NOP;

//--------------------- .text.gemv                --------------------------
\t.section\t.text.gemv,\"ax\",@progbits
gemv:
.text.gemv:
.L_x_46:
        /*0350*/                   LDG.E.NA.128.CONSTANT R24, desc[UR12][R24.64] ;
        /*03a0*/                   LDG.E.U16.CONSTANT R53, desc[UR12][R2.64] ;
.L_x_45:
        /*0400*/                   LDS.128 R4, [R9] ;
        /*0410*/                   LOP3.LUT R0, R55.reuse, 0x7, RZ, 0xc0, !PT ;
        /*0420*/              @!P0 BRA `(.L_x_45) ;
        /*0430*/              @!P0 BRA `(.L_x_46) ;
        /*0440*/                   EXIT ;
";

    #[test]
    fn kernels_and_their_main_loops_are_found() {
        let kernels = parse(SASS);
        let names: Vec<&str> = kernels.iter().map(|kernel| kernel.name.as_str()).collect();
        assert_eq!(names, ["rmsnorm_f32", "gemv"]);
        assert_eq!(kernels[0].mix().instructions, 11);
        let main = kernels[0].main_loop().expect("a loop");
        assert_eq!((main.instructions, main.load_bytes), (5, 16));
        assert_eq!(main.kinds[0], ("float", 2));
        assert_eq!(
            main.shares(),
            "float 40%, branch 20%, global load 20%, integer 20%"
        );
    }

    #[test]
    fn a_loop_around_one_that_loads_nothing_is_the_main_loop() {
        let kernels = parse(SASS);
        let main = kernels[1].main_loop().expect("a loop");
        assert_eq!(
            (main.instructions, main.load_bytes, main.weight_bytes),
            (6, 18, 16)
        );
    }

    #[test]
    fn constants_in_disguise_are_moves() {
        for (opcode, expected) in [
            ("HFMA2.MMA", "move"),
            ("HFMA2", "half"),
            ("IMAD.MOV.U32", "move"),
            ("IMAD.WIDE.U32", "integer"),
            ("HMMA.16816.F32", "matrix"),
            ("STL.64", "local"),
            ("BAR.SYNC.DEFER_BLOCKING", "wait"),
        ] {
            assert_eq!(kind(opcode), expected, "{opcode}");
        }
        assert_eq!(load_bytes("LDG.E.U8.CONSTANT"), 1);
        assert_eq!(load_bytes("LDG.E"), 4);
    }

    #[test]
    fn one_kernel_is_cut_out() {
        let gemv = text(SASS, "gemv").expect("there");
        assert!(gemv.starts_with(".text.gemv:\n") && gemv.ends_with("EXIT ;\n"));
        let norm = text(SASS, "rmsnorm_f32").expect("there");
        assert!(norm.ends_with("NOP;\n\n"), "{norm}");
        assert_eq!(text(SASS, "rms"), None);
        assert!(parse("no code").is_empty());
    }
}
