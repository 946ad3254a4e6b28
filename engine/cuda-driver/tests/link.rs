//! A program that uses `cust` links and starts without a CUDA installation, and gets an error, not
//! a crash, where there is no driver.

use cuda_driver::driver_available;
use cust::CudaFlags;
use cust::context::Context;
use cust::device::Device;

#[test]
fn cust_works_through_the_forwarders() {
    match driver_available() {
        Ok(()) => {
            let device = Device::get_device(0).expect("a device was counted");
            let _context = Context::new(device).expect("context");
            assert!(!device.name().expect("name").is_empty());
        }
        Err(reason) => {
            println!("skipped: no GPU ({reason})");
            assert!(!reason.contains('\n'), "one line: {reason}");
            assert!(cust::init(CudaFlags::empty()).is_err());
            assert!(cuda_driver::last_error().is_some_and(|name| name.starts_with("CUDA_ERROR")));
            assert!(Device::num_devices().is_err());
        }
    }
}
