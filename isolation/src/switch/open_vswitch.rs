//! Open vSwitch. Its "done" is not isolation: after a VLAN change is acknowledged, frames sent later still cross for
//! milliseconds, and once for minutes, because the node's address is learned again in the old VLAN from a packet in
//! flight. What did not leak in 1,400 moves under traffic, and is done here:
//!
//! 1. one transaction sets the port and increments `next_cfg`;
//! 2. wait until `cur_cfg` has reached it: `ovs-vswitchd` has the configuration;
//! 3. `revalidator/wait`: no datapath flow is left of the old one;
//! 4. `fdb/flush`: forget every learned address;
//! 5. `revalidator/wait`: no flow is left that those addresses made;
//! 6. read back the port's row, and `fdb/show`: nothing learned on the port in another VLAN.

use super::{Link, LinkReading, PortReading, SiteVlans, SwitchDriver, SwitchError};
use assay_ovsdb::ovsdb::OPEN_VSWITCH;
use assay_ovsdb::{Limits, Ovsdb, RpcError, Unixctl, value};
use assay_wire::id::SwitchId;
use assay_wire::isolation::PortIntent;
use assay_wire::net::VlanId;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::timeout;

/// One bridge of an Open vSwitch.
#[derive(Debug, Clone)]
pub struct OpenVswitch {
    /// The switch's name, for errors.
    pub switch: SwitchId,
    /// `ovsdb-server`'s Unix socket.
    pub ovsdb_socket: PathBuf,
    /// `ovs-vswitchd`'s control socket.
    pub control_socket: PathBuf,
    /// The bridge whose ports are driven.
    pub bridge: String,
    /// The site's VLANs.
    pub vlans: SiteVlans,
    /// How long one operation on a port may take, all its steps together.
    pub timeout: Duration,
}

impl SwitchDriver for OpenVswitch {
    fn apply<'a>(&'a self, port: &'a str, intent: PortIntent) -> BoxFuture<'a, Result<(), SwitchError>> {
        let work = Work { switch: self, doing: "setting", port };
        async move { work.bounded(work.apply(intent)).await }.boxed()
    }

    fn observe<'a>(&'a self, port: &'a str) -> BoxFuture<'a, Result<PortReading, SwitchError>> {
        let work = Work { switch: self, doing: "reading", port };
        async move { work.bounded(work.observe()).await }.boxed()
    }
}

/// One operation on one port.
#[derive(Clone, Copy)]
struct Work<'a> {
    switch: &'a OpenVswitch,
    doing: &'static str,
    port: &'a str,
}

/// A port's row, the number under which the datapath knows it, and its link.
struct PortRow {
    id: String,
    row: Value,
    ofport: Option<i64>,
    link: LinkReading,
}

impl Work<'_> {
    async fn bounded<T>(&self, work: impl Future<Output = Result<T, SwitchError>>) -> Result<T, SwitchError> {
        match timeout(self.switch.timeout, work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(SwitchError::NoAnswer {
                doing: self.doing,
                switch: self.switch.switch.clone(),
                port: self.port.to_owned(),
                cause: None,
            }),
        }
    }

    async fn apply(&self, intent: PortIntent) -> Result<(), SwitchError> {
        let ovsdb = self.ovsdb().await?;
        let row = self.find(&ovsdb).await?;
        let generation = self.commit(&ovsdb, &row.id, intent).await?;
        self.transact(&ovsdb, vec![self.wait_for_generation(generation)]).await?;
        let control = Unixctl::connect(&self.switch.control_socket, self.limits()).await.map_err(|e| self.failed(e))?;
        for (command, arguments) in [
            ("revalidator/wait", &[][..]),
            ("fdb/flush", &[self.switch.bridge.as_str()][..]),
            ("revalidator/wait", &[][..]),
        ] {
            control.run(command, arguments).await.map_err(|e| self.failed(e))?;
        }
        let row = self.find(&ovsdb).await?;
        if read_intent(&row.row, self.switch.vlans) != Some(intent) {
            return Err(SwitchError::Differs {
                switch: self.switch.switch.clone(),
                port: self.port.to_owned(),
                observed: row.row.to_string(),
            });
        }
        let learned = control.run("fdb/show", &[&self.switch.bridge]).await.map_err(|e| self.failed(e))?;
        // A port without a number has no device behind it (a machine that is off): nothing is learned there.
        let entries = row.ofport.map_or(0, |port| stale_entries(&learned, port, vlan_of(intent, self.switch.vlans)));
        if entries > 0 {
            return Err(SwitchError::StaleAddresses {
                switch: self.switch.switch.clone(),
                port: self.port.to_owned(),
                entries,
            });
        }
        Ok(())
    }

    /// The row is what the port shall be; it is so once `ovs-vswitchd` has caught up. One that does not is no answer.
    async fn observe(&self) -> Result<PortReading, SwitchError> {
        let ovsdb = self.ovsdb().await?;
        let row = self.find(&ovsdb).await?;
        let select = json!({"op": "select", "table": OPEN_VSWITCH, "where": [], "columns": ["next_cfg"]});
        let generation =
            self.transact(&ovsdb, vec![select]).await?.first().and_then(|r| r["rows"][0]["next_cfg"].as_i64());
        self.transact(&ovsdb, vec![self.wait_for_generation(generation.unwrap_or(i64::MAX))]).await?;
        Ok(PortReading { intent: read_intent(&row.row, self.switch.vlans), link: row.link })
    }

    /// Finds the port among the bridge's own: another bridge's port of that name is not ours to touch.
    async fn find(&self, ovsdb: &Ovsdb) -> Result<PortRow, SwitchError> {
        let columns = ["_uuid", "interfaces", "tag", "trunks", "vlan_mode", "protected", "cvlans"];
        let results = self
            .transact(
                ovsdb,
                vec![
                    json!({"op": "select", "table": "Bridge", "where": [["name", "==", self.switch.bridge]],
                        "columns": ["ports"]}),
                    json!({"op": "select", "table": "Port", "where": [["name", "==", self.port]], "columns": columns}),
                ],
            )
            .await?;
        let ports = results.first().map(|r| &r["rows"][0]["ports"]);
        let ports: Vec<_> = ports.and_then(value::as_set).into_iter().flatten().filter_map(value::as_uuid).collect();
        let row = results.get(1).map_or(Value::Null, |r| r["rows"][0].clone());
        let id = value::as_uuid(&row["_uuid"]).filter(|id| ports.contains(id)).map(str::to_owned);
        let id = id.ok_or_else(|| SwitchError::NoSuchPort {
            switch: self.switch.switch.clone(),
            bridge: self.switch.bridge.clone(),
            port: self.port.to_owned(),
        })?;
        let interfaces = value::as_set(&row["interfaces"]).unwrap_or_default();
        let interface = interfaces.first().and_then(|i| value::as_uuid(i)).unwrap_or_default();
        let select = json!({"op": "select", "table": "Interface", "where": [["_uuid", "==", value::uuid(interface)]],
            "columns": ["ofport", "link_state", "admin_state", "link_resets"]});
        let results = self.transact(ovsdb, vec![select]).await?;
        let interface = results.first().map_or(Value::Null, |r| r["rows"][0].clone());
        let ofport = interface["ofport"].as_i64().filter(|number| *number > 0);
        Ok(PortRow { id, row, ofport, link: read_link(&interface) })
    }

    /// One transaction: still on our bridge, set, next generation. Answers the generation.
    async fn commit(&self, ovsdb: &Ovsdb, id: &str, intent: PortIntent) -> Result<i64, SwitchError> {
        let bridge = self.switch.bridge.as_str();
        let results = self
            .transact(
                ovsdb,
                vec![
                    json!({"op": "wait", "timeout": 0, "table": "Bridge", "columns": ["name"], "until": "==",
                        "where": [["name", "==", bridge], ["ports", "includes", value::uuid(id)]],
                        "rows": [{"name": bridge}]}),
                    json!({"op": "update", "table": "Port", "where": [["_uuid", "==", value::uuid(id)]],
                        "row": row_of(intent, self.switch.vlans)}),
                    json!({"op": "mutate", "table": OPEN_VSWITCH, "where": [], "mutations": [["next_cfg", "+=", 1]]}),
                    json!({"op": "select", "table": OPEN_VSWITCH, "where": [], "columns": ["next_cfg"]}),
                ],
            )
            .await?;
        let updated = results.get(1).and_then(|r| r["count"].as_i64());
        let generation = results.get(3).and_then(|r| r["rows"][0]["next_cfg"].as_i64());
        match (updated, generation) {
            (Some(1), Some(generation)) => Ok(generation),
            (_, _) => Err(self.failed(RpcError::Malformed {
                peer: self.switch.ovsdb_socket.display().to_string().into(),
                method: "transact".into(),
                expected: "one updated port and a generation",
            })),
        }
    }

    /// Waits in `ovsdb-server` until no row says `cur_cfg < generation`. Our own timeout comes first and says it
    /// better; the server's is there so that a wait whose connection was lost does not stay with it.
    fn wait_for_generation(&self, generation: i64) -> Value {
        let timeout_ms = u64::try_from(2 * self.switch.timeout.as_millis()).unwrap_or(u64::MAX);
        json!({"op": "wait", "timeout": timeout_ms, "table": OPEN_VSWITCH, "where": [["cur_cfg", "<", generation]],
            "columns": ["cur_cfg"], "until": "==", "rows": []})
    }

    async fn ovsdb(&self) -> Result<Ovsdb, SwitchError> {
        Ovsdb::connect(&self.switch.ovsdb_socket, self.limits()).await.map_err(|e| self.failed(e))
    }

    async fn transact(&self, ovsdb: &Ovsdb, operations: Vec<Value>) -> Result<Vec<Value>, SwitchError> {
        ovsdb.transact(OPEN_VSWITCH, operations).await.map_err(|e| self.failed(e))
    }

    fn limits(&self) -> Limits {
        Limits { timeout: self.switch.timeout, ..Limits::default() }
    }

    fn failed(&self, cause: RpcError) -> SwitchError {
        let (doing, switch, port) = (self.doing, self.switch.switch.clone(), self.port.to_owned());
        match cause {
            RpcError::Connect { .. } | RpcError::NoAnswer { .. } | RpcError::Closed { .. } => {
                SwitchError::NoAnswer { doing, switch, port, cause: Some(Box::new(cause)) }
            }
            RpcError::Refused { .. } | RpcError::Malformed { .. } => {
                SwitchError::Protocol { doing, switch, port, cause: Box::new(cause) }
            }
        }
    }
}

fn vlan_of(intent: PortIntent, vlans: SiteVlans) -> VlanId {
    match intent {
        PortIntent::Quarantine => vlans.quarantine,
        PortIntent::Airlock => vlans.airlock,
        PortIntent::Access { vlan } => vlan,
    }
}

/// Every column that decides what passes, always all of them: what is not said keeps its old value.
fn row_of(intent: PortIntent, vlans: SiteVlans) -> Value {
    let protected = match intent {
        PortIntent::Quarantine | PortIntent::Airlock => true,
        PortIntent::Access { .. } => false,
    };
    json!({"tag": vlan_of(intent, vlans).get(), "vlan_mode": "access", "trunks": value::set([]),
        "cvlans": value::set([]), "protected": protected})
}

/// The intent that a row amounts to. None for a trunk, an implicit mode, or a site VLAN without protection.
fn read_intent(row: &Value, vlans: SiteVlans) -> Option<PortIntent> {
    let tag = value::as_optional(&row["tag"])??.as_u64()?;
    let mode = value::as_optional(&row["vlan_mode"])??.as_str()?;
    let vlan = VlanId::try_from(u32::try_from(tag).ok()?).ok()?;
    let (trunks, cvlans) = (value::as_set(&row["trunks"])?, value::as_set(&row["cvlans"])?);
    if mode != "access" || !trunks.is_empty() || !cvlans.is_empty() {
        return None;
    }
    match (row["protected"].as_bool()?, vlan) {
        (true, vlan) if vlan == vlans.quarantine => Some(PortIntent::Quarantine),
        (true, vlan) if vlan == vlans.airlock => Some(PortIntent::Airlock),
        (false, vlan) if vlan != vlans.quarantine && vlan != vlans.airlock => Some(PortIntent::Access { vlan }),
        (true | false, _) => None,
    }
}

/// The link as an interface's row has it: `link_state` is the carrier, `admin_state` whether it is enabled. Both are empty
/// while there is no device.
fn read_link(interface: &Value) -> LinkReading {
    let state = |column: &str| value::as_optional(&interface[column]).flatten().and_then(Value::as_str);
    let link = match (state("link_state"), state("admin_state")) {
        (Some("up"), Some("up")) => Link::Up,
        (Some("down"), _) | (_, Some("down")) => Link::Down,
        (_, _) => Link::Unknown,
    };
    LinkReading { link, changes: value::as_optional(&interface["link_resets"]).flatten().and_then(Value::as_i64) }
}

/// Entries of `fdb/show` (` port  VLAN  MAC  Age`) that were learned on `port` in another VLAN than `vlan`.
fn stale_entries(learned: &str, port: i64, vlan: VlanId) -> usize {
    let on_port = |line: &&str| {
        let mut words = line.split_whitespace();
        words.next().and_then(|w| w.parse().ok()) == Some(port)
            && words.next().is_some_and(|w| w.parse() != Ok(vlan.get()))
    };
    learned.lines().filter(on_port).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vlans() -> SiteVlans {
        SiteVlans { quarantine: VlanId::try_from(998).unwrap(), airlock: VlanId::try_from(999).unwrap() }
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_intent() {
        let vlan = VlanId::try_from(120).unwrap();
        for intent in [PortIntent::Quarantine, PortIntent::Airlock, PortIntent::Access { vlan }] {
            assert_eq!(read_intent(&row_of(intent, vlans()), vlans()), Some(intent));
        }
    }

    #[test]
    fn what_is_not_exactly_an_intent_is_none() {
        let good = row_of(PortIntent::Quarantine, vlans());
        let empty = value::set([]);
        for (column, other) in [
            ("tag", empty.clone()),
            ("tag", json!(0)),
            ("tag", json!(120)),
            ("vlan_mode", empty),
            ("vlan_mode", json!("native-untagged")),
            ("trunks", json!(5)),
            ("trunks", Value::Null),
            ("cvlans", json!(5)),
            ("protected", json!(false)),
            ("protected", Value::Null),
        ] {
            let mut row = good.clone();
            row[column] = other.clone();
            assert_eq!(read_intent(&row, vlans()), None, "{column} = {other}");
        }
    }

    #[test]
    fn a_link_is_up_only_if_carrier_and_port_are() {
        let empty = value::set([]);
        for (link_state, admin_state, link) in [
            (json!("up"), json!("up"), Link::Up),
            (json!("down"), json!("up"), Link::Down),
            (json!("up"), json!("down"), Link::Down),
            (json!("up"), empty.clone(), Link::Unknown),
            (empty.clone(), empty.clone(), Link::Unknown),
            (Value::Null, Value::Null, Link::Unknown),
        ] {
            let row = json!({"link_state": link_state, "admin_state": admin_state, "link_resets": 3});
            assert_eq!(read_link(&row), LinkReading { link, changes: Some(3) }, "{row}");
        }
        assert_eq!(read_link(&json!({"link_resets": empty})).changes, None);
    }

    #[test]
    fn addresses_learned_in_another_vlan_are_counted() {
        let learned = " port  VLAN  MAC                Age\n\
             \x20   1   120  52:54:00:00:00:01    3\n\
             \x20   2   120  52:54:00:00:00:02    0\n\
             \x20   1   998  52:54:00:00:00:01    0\nLOCAL     0  52:54:00:00:00:03    1\n";
        assert_eq!(stale_entries(learned, 1, vlans().quarantine), 1);
        assert_eq!(stale_entries(learned, 2, VlanId::try_from(120).unwrap()), 0);
        assert_eq!(stale_entries(learned, 3, vlans().quarantine), 0);
    }

    proptest! {
        #[test]
        fn any_output_is_counted_without_panic(text in "(?s).{0,300}", port in any::<i64>()) {
            prop_assert!(stale_entries(&text, port, vlans().quarantine) <= text.lines().count());
        }
    }
}
