//! Performance directives that rustc has no attribute for: kernels leave them as remarks in the
//! PTX, and here they get to where the assembler reads them.

use std::borrow::Cow;

/// What `cuda_std::thread::max_block_threads` leaves in a kernel's body.
const REMARK: &str = "// .maxntid ";

/// `ptx` with a `.maxntid` between the parameters and the body of each kernel whose body has the
/// remark. What has its directive already is left as it is.
///
/// One such block a multiprocessor is enough: without `.minnctapersm` to say so, the assembler of some
/// GPU generations makes room for two and spills.
pub fn apply(ptx: &str) -> Cow<'_, str> {
    if !ptx.contains(REMARK) {
        return Cow::Borrowed(ptx);
    }
    let mut out = String::with_capacity(ptx.len() + 1024);
    let mut rest = ptx;
    while let Some(start) = rest.find("\n.visible .entry ") {
        let (before, entry) = rest.split_at(start + 1);
        out.push_str(before);
        // A body starts and ends with a brace at the start of a line.
        let body = entry.find("\n{").map_or(entry.len(), |at| at + 1);
        let end = body + entry[body..].find("\n}").unwrap_or(entry.len() - body);
        let (signature, rest_of_entry) = entry.split_at(body);
        out.push_str(signature);
        let threads = remark(&entry[body..end]).filter(|_| !signature.contains(".maxntid"));
        if let Some(threads) = threads {
            out.push_str(&format!(".maxntid {threads}, 1, 1\n.minnctapersm 1\n"));
        }
        let (text, after) = rest_of_entry.split_at(end - body);
        out.push_str(text);
        rest = after;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The number of the first remark.
fn remark(body: &str) -> Option<u32> {
    let (_, after) = body.split_once(REMARK)?;
    let digits = after.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remark_becomes_the_kernels_directive() {
        let ptx = ".version 7.4\n\n.visible .entry a(\n\t.param .u64 p\n)\n{\n\t{ // begin\n\t// .maxntid 384;\n\t}\n\tret;\n}\n\
                   .visible .entry b(\n)\n{\n\tret;\n}\n// end\n";
        let expected = ptx.replacen(")\n{", ")\n.maxntid 384, 1, 1\n.minnctapersm 1\n{", 1);
        assert_eq!(apply(ptx), expected);
        assert_eq!(apply(&expected), expected);
    }

    #[test]
    fn other_ptx_stays_as_it_is() {
        let ptx = ".version 7.4\n\n.visible .entry b(\n)\n{\n\tret;\n}\n";
        assert_eq!(apply(ptx), ptx);
        assert_eq!(
            apply("\n.visible .entry cut // .maxntid 5"),
            "\n.visible .entry cut // .maxntid 5"
        );
    }
}
