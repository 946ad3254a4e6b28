//! Every kernel case on a real GPU, in every tier that it runs. Skipped, aloud, without one.

use benches::check;
use benches::ptx::Ptx;
use engine::backend::cuda;

#[test]
fn kernels_match_their_references_on_the_gpu() {
    if let Err(reason) = cuda::available() {
        println!("skipped: no GPU ({reason})");
        return;
    }
    let ptx = Ptx::embedded();
    for tier in ptx.tiers() {
        let Some(gpu) = ptx.open(tier).expect("the GPU opens") else {
            println!("skipped: this GPU cannot run {tier}");
            continue;
        };
        let outcomes = check::run(&gpu, |_| true);
        assert!(!outcomes.is_empty());
        assert_eq!(
            check::report(&tier.to_string(), &outcomes),
            0,
            "cases failed in {tier}"
        );
    }
}
