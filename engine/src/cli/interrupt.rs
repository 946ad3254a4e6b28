//! Ctrl-C: the first one ends the work at the next good moment, the second one the process.

use std::sync::atomic::{AtomicBool, Ordering};

use engine::Error;

/// Exit code of an interrupted command.
pub const EXIT_CODE: u8 = 130;

/// Raised by the first Ctrl-C.
pub static RAISED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C was pressed.
pub fn raised() -> bool {
    RAISED.load(Ordering::Relaxed)
}

/// Catches Ctrl-C from here on. To be called once.
///
/// # Errors
/// [`Error::Machine`] if the system does not allow it.
pub fn catch() -> Result<(), Error> {
    ctrlc::set_handler(|| {
        if RAISED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT_CODE.into());
        }
    })
    .map_err(|e| Error::Machine(format!("cannot catch Ctrl-C: {e}")))
}
