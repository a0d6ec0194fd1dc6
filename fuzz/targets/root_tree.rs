#![no_main]
//! A tar file or OCI layer that somebody wants an image of: whatever it says, each name is one within the image.

use assay_imaging::tree::model::Model;
use assay_imaging::tree::oci::layers;
use assay_imaging::tree::tar::{Kind, Reader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = layers("manifest", bytes);
    let (mut reader, mut model, mut number) = (Reader::new(bytes), Model::default(), 0);
    let mut buffer = [0; 4096];
    while let Ok(Some(entry)) = reader.next_entry() {
        // An empty file begins another layer.
        if entry.kind == Kind::File && entry.size == 0 {
            model.next_layer();
        }
        number += 1;
        let _refused = model.add(entry, number);
        if reader.read_data(&mut buffer).is_err() {
            break;
        }
    }
    let walked = model.walk(|path, index, _| {
        assert!(index < model.nodes().len());
        assert!(path.iter().all(|part| !part.is_empty() && *part != b"." && *part != b".."));
        assert!(path.iter().all(|part| !part.contains(&b'/') && !part.contains(&0)));
        Ok(())
    });
    assert!(walked.is_ok());
});
