//! The lab's own hardware: a BMC that really turns a machine with real firmware on and off, driven by curl.

#[test]
fn bmc_turns_a_node_with_real_firmware_on_and_off() {
    let played = crate::play::play("hardware");
    let position = |name: &str| played.events.iter().position(|event| event.is(name, "n1"));
    let order = ["node.powered", "firmware.spoke", "node.reset", "node.off"].map(position);
    assert!(order.iter().all(Option::is_some), "{order:?}\n{}", played.output);
    assert!(order.is_sorted(), "{order:?}\n{}", played.output);
}
