//! The `#[kernel]` attribute of `cuda_std`.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::spanned::Spanned;
use syn::{Error, FnArg, Ident, ItemFn, Pat, ReturnType, parse_macro_input};

/// Turns an `unsafe fn` into a kernel.
///
/// For `nvptx64` the function becomes `#[unsafe(no_mangle)] unsafe extern "ptx-kernel" fn`, a
/// `.visible .entry` of the PTX under its own name. On the host it stays a plain `unsafe fn` that
/// runs under the emulator, and next to it, with its visibility, appears `static <NAME>_ENTRY:
/// cuda_std::emulator::Entry` (the name in capitals), which calls it with arguments taken from
/// 64-bit slots.
///
/// # Errors
/// The function has to be `unsafe`, without generics, `async`, `const`, an ABI of its own or a
/// result; every parameter is a plain name whose type implements `cuda_std::emulator::KernelParam`
/// (raw pointers, `u32`, `i32`, `u64`, `i64`, `f32`). Anything else is a compile error.
#[proc_macro_attribute]
pub fn kernel(
    attribute: proc_macro::TokenStream,
    item: proc_macro::TokenStream,
) -> proc_macro::TokenStream {
    let function = parse_macro_input!(item as ItemFn);
    expand(attribute.into(), &function)
        .unwrap_or_else(Error::into_compile_error)
        .into()
}

fn expand(attribute: TokenStream, function: &ItemFn) -> Result<TokenStream, Error> {
    if !attribute.is_empty() {
        return Err(Error::new(attribute.span(), "#[kernel] takes no arguments"));
    }
    check_signature(function)?;
    let ItemFn {
        attrs,
        vis,
        sig,
        block,
    } = function;
    let name = &sig.ident;
    let inputs = &sig.inputs;
    let entry = format_ident!(
        "{}_ENTRY",
        name.to_string().to_uppercase(),
        span = name.span()
    );
    let entry_doc = format!("Emulator entry of [`{name}`].");
    let name_text = name.to_string();
    let arity = inputs.len();
    let slots = arguments(function)?;
    let indices = 0..arity;
    let types: Vec<_> = slots.iter().map(|(_, ty)| ty).collect();
    Ok(quote! {
        #[cfg(target_arch = "nvptx64")]
        #(#attrs)*
        #[unsafe(no_mangle)]
        #vis unsafe extern "ptx-kernel" fn #name(#inputs) #block

        #[cfg(not(target_arch = "nvptx64"))]
        #(#attrs)*
        #vis unsafe fn #name(#inputs) #block

        #[cfg(not(target_arch = "nvptx64"))]
        #[doc = #entry_doc]
        #vis static #entry: ::cuda_std::emulator::Entry = {
            #[allow(clippy::undocumented_unsafe_blocks)]
            unsafe fn call(slots: &[u64]) {
                // The slots hold the arguments in parameter order, as `Entry::call` demands.
                unsafe {
                    #name(#(<#types as ::cuda_std::emulator::KernelParam>::from_slot(slots[#indices])),*)
                }
            }
            ::cuda_std::emulator::Entry { name: #name_text, arity: #arity, call }
        };
    })
}

fn check_signature(function: &ItemFn) -> Result<(), Error> {
    let sig = &function.sig;
    let refuse = |span: Span, what: &str| Err(Error::new(span, what));
    if sig.unsafety.is_none() {
        return refuse(
            sig.fn_token.span,
            "a kernel is an `unsafe fn`: it trusts its pointers",
        );
    }
    if let Some(token) = sig.asyncness {
        return refuse(token.span, "a kernel cannot be `async`");
    }
    if let Some(token) = sig.constness {
        return refuse(token.span, "a kernel cannot be `const`");
    }
    if let Some(abi) = &sig.abi {
        return refuse(abi.span(), "#[kernel] sets the ABI itself");
    }
    if !sig.generics.params.is_empty() {
        return refuse(
            sig.generics.span(),
            "a kernel has one entry name: it cannot be generic",
        );
    }
    if !matches!(sig.output, ReturnType::Default) {
        return refuse(sig.output.span(), "a kernel returns nothing");
    }
    Ok(())
}

fn arguments(function: &ItemFn) -> Result<Vec<(Ident, syn::Type)>, Error> {
    function
        .sig
        .inputs
        .iter()
        .map(|input| match input {
            FnArg::Typed(typed) => match typed.pat.as_ref() {
                Pat::Ident(pat) => Ok((pat.ident.clone(), (*typed.ty).clone())),
                other => Err(Error::new(
                    other.span(),
                    "a kernel parameter is a plain name",
                )),
            },
            FnArg::Receiver(receiver) => {
                Err(Error::new(receiver.span(), "a kernel takes no `self`"))
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::expand;
    use proc_macro2::TokenStream;
    use quote::quote;

    fn message(item: TokenStream) -> String {
        let function = syn::parse2(item).expect("a function");
        expand(TokenStream::new(), &function)
            .expect_err("refused")
            .to_string()
    }

    #[test]
    fn refuses_what_a_launch_cannot_call() {
        assert!(
            message(quote!(
                fn k() {}
            ))
            .contains("unsafe fn")
        );
        assert!(
            message(quote!(
                unsafe fn k() -> u32 {
                    1
                }
            ))
            .contains("returns nothing")
        );
        assert!(
            message(quote!(
                unsafe fn k<T>(x: T) {}
            ))
            .contains("generic")
        );
        assert!(
            message(quote!(
                unsafe fn k((a, b): (u32, u32)) {}
            ))
            .contains("plain name")
        );
        assert!(
            message(quote!(
                unsafe extern "C" fn k() {}
            ))
            .contains("ABI")
        );
    }

    #[test]
    fn makes_an_entry_with_the_arity() {
        let function = syn::parse2(quote!(
            pub unsafe fn scale_f32(x: *mut f32, n: u32) {}
        ))
        .expect("a function");
        let text = expand(TokenStream::new(), &function)
            .expect("expands")
            .to_string();
        assert!(text.contains("SCALE_F32_ENTRY"));
        assert!(text.contains("arity : 2usize"));
        assert!(text.contains("\"ptx-kernel\""));
    }
}
