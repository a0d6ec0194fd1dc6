//! The API's document: complete, and the same as the one in git.

#[test]
fn the_document_in_git_is_the_one_that_the_code_makes() {
    let made = assay_isolation::openapi().to_pretty_json().expect("a document") + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    if std::env::var_os("ASSAY_WRITE_OPENAPI").is_some() {
        std::fs::write(path, &made).expect("the document is written");
    }
    let kept = std::fs::read_to_string(path).expect("the document in git");
    assert!(kept == made, "isolation/openapi.json is out of date: run this test with ASSAY_WRITE_OPENAPI=1");
}

#[test]
fn every_operation_says_what_it_answers() {
    let document = serde_json::to_value(assay_isolation::openapi()).expect("a document");
    let paths = document["paths"].as_object().expect("paths");
    let operations: Vec<_> = paths.values().flat_map(|path| path.as_object().into_iter().flatten()).collect();
    assert_eq!(operations.len(), 23);
    for (method, operation) in operations {
        assert!(operation["responses"]["200"].is_object(), "{method}: {operation}");
    }
    for schema in ["NodeStatus", "Admission", "BootRecords", "Problem"] {
        assert!(document["components"]["schemas"][schema].is_object(), "{schema}");
    }
}
