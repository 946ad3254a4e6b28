//! The inputs that fuzzing kept, through the functions that were fuzzed.

#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::path::Path;

#[test]
fn every_input_of_the_corpus_is_taken_or_refused() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in targets::ALL {
        let folder = corpus.join(name);
        let files = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder:?}: {e}"));
        let mut count = 0;
        for file in files {
            let path = file.expect("listed").path();
            // Shown if the target panics.
            println!("{}", path.display());
            target(&std::fs::read(&path).expect("read"));
            count += 1;
        }
        assert!(count > 0, "{folder:?} is empty");
    }
}
