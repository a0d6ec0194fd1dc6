//! The hardware by itself, driven as an operator would: a BMC by curl, a console by eye.

use crate::command::run;
use crate::error::{LabError, Result};
use crate::events::EventLog;
use crate::site::{Site, SiteNode};
use crate::steps::POWERED;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A BMC turns a node on from the network, once; firmware speaks; a reset is noticed; power goes off.
///
/// # Errors
/// Something that must hold did not.
pub(super) async fn bmc_and_firmware(site: &Site, events: &EventLog, name: &str) -> Result<()> {
    let node = site.node(name)?;
    let ca = site.folder.join("bmc-ca.pem");
    fs::write(&ca, &node.bmc.ca_pem).map_err(LabError::io(format!("writing {}", ca.display())))?;
    let client = Curl { node, ca };
    client.is_refused_without_password().await?;
    expect(&client.system().await?, "/PowerState", "Off")?;

    let once = json!({ "Boot": { "BootSourceOverrideTarget": "Pxe", "BootSourceOverrideEnabled": "Once" } });
    client.send("PATCH", &node.bmc.system_url(), &once).await?;
    expect(&client.system().await?, "/Boot/BootSourceOverrideEnabled", "Once")?;
    let console = node.machine.console();
    client.reset("On").await?;
    let on = client.system().await?;
    expect(&on, "/PowerState", "On")?;
    expect(&on, "/Boot/BootSourceOverrideEnabled", "Disabled")?;
    events.wait_for("the node to be on", 0, POWER_LIMIT, |event| event.is(POWERED, name)).await?;
    console.wait_for(FIRMWARE_SPEAKS, 0, FIRMWARE_LIMIT).await?;
    events.lab("firmware.spoke", &json!({ "node": name }));

    // As the guest could: nobody asked the BMC, and yet it knows.
    node.machine.reset().await?;
    events.wait_for("the reset to be noticed", 0, POWER_LIMIT, |event| event.is("node.reset", name)).await?;
    let after = client.system().await?;
    if after.pointer("/LastResetTime") == on.pointer("/LastResetTime") {
        return Err(LabError::unexpected(format!("resetting {name}"), "LastResetTime did not change"));
    }
    client.reset("ForceOff").await?;
    expect(&client.system().await?, "/PowerState", "Off")?;
    events.wait_for("the node to be off", 0, POWER_LIMIT, |event| event.is("node.off", name)).await?;
    Ok(())
}

/// A Redfish client that is not ours.
struct Curl<'a> {
    node: &'a SiteNode,
    ca: PathBuf,
}

impl Curl<'_> {
    async fn system(&self) -> Result<Value> {
        let text = self.curl(&["--fail", &self.node.bmc.system_url()], true).await?;
        serde_json::from_str(&text).map_err(LabError::service("reading the BMC's answer"))
    }

    async fn send(&self, method: &str, url: &str, body: &Value) -> Result<()> {
        let body = body.to_string();
        self.curl(&["--fail", "--request", method, url, "--data", &body], true).await.map(drop)
    }

    async fn reset(&self, kind: &str) -> Result<()> {
        let action = format!("{}/Actions/ComputerSystem.Reset", self.node.bmc.system_url());
        self.send("POST", &action, &json!({ "ResetType": kind })).await
    }

    async fn is_refused_without_password(&self) -> Result<()> {
        let url = self.node.bmc.system_url();
        let status = self.curl(&["--output", "/dev/null", "--write-out", "%{http_code}", &url], false).await?;
        if status == "401" {
            return Ok(());
        }
        Err(LabError::unexpected("calling the BMC without a password", format!("it answered {status}, not 401")))
    }

    async fn curl(&self, arguments: &[&str], with_password: bool) -> Result<String> {
        let bmc = &self.node.bmc;
        let mut curl = crate::command::command("curl");
        curl.args(["--silent", "--show-error", "--max-time", "30", "--cacert"]).arg::<&Path>(&self.ca);
        if with_password {
            curl.arg("--user").arg(format!("{}:{}", bmc.username, bmc.password));
        }
        curl.args(arguments);
        run(curl, "calling the BMC", POWER_LIMIT).await
    }
}

fn expect(resource: &Value, pointer: &str, wanted: &str) -> Result<()> {
    match resource.pointer(pointer).and_then(Value::as_str) {
        Some(found) if found == wanted => Ok(()),
        found => Err(LabError::unexpected(format!("reading {pointer}"), format!("expected {wanted}, found {found:?}"))),
    }
}

const FIRMWARE_SPEAKS: &str = "PXE over IPv4";
const FIRMWARE_LIMIT: Duration = Duration::from_secs(120);
const POWER_LIMIT: Duration = Duration::from_secs(40);
