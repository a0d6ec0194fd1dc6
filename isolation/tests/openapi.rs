//! The API's document is complete. That the one in git is current is checked by the root's `tests/openapi.rs`.

#[test]
fn every_operation_says_what_it_answers() {
    let document = serde_json::to_value(assay_isolation::openapi()).expect("a document");
    let paths = document["paths"].as_object().expect("paths");
    let operations: Vec<_> = paths.values().flat_map(|path| path.as_object().into_iter().flatten()).collect();
    assert_eq!(operations.len(), 24);
    for (method, operation) in operations {
        assert!(operation["responses"]["200"].is_object(), "{method}: {operation}");
    }
    for schema in ["NodeStatus", "Admission", "BootRecords", "Problem"] {
        assert!(document["components"]["schemas"][schema].is_object(), "{schema}");
    }
}
