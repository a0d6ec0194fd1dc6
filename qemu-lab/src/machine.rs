//! A machine: QEMU with UEFI firmware and a software TPM, running only while its power is on. Whoever holds the
//! machine can turn it on, off and reset it; nothing else keeps it alive.

use crate::command::{command, tail, wait_until};
use crate::console::Console;
use crate::error::{LabError, Result};
use crate::netns::Netns;
use crate::qmp::{Qmp, QmpEvent};
use crate::tpm::{RunningTpm, TpmState};
use assay_wire::net::MacAddr;
use serde_json::json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What a machine is made of.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// The node's name.
    pub name: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Its NIC's address.
    pub mac: MacAddr,
    /// The tap that its NIC is plugged into.
    pub tap: String,
    /// Where that tap is.
    pub netns: Netns,
    /// Where its variables, logs and sockets live.
    pub folder: PathBuf,
    /// What executes it.
    pub execution: Execution,
}

/// What executes a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Execution {
    /// QEMU in software, which works everywhere. Firmware does not run on every KVM.
    Emulated,
    /// Nothing: power is only a flag, and a scenario acts for the node, with its TPM and on its cable.
    Soft,
}

/// Where the machine boots from when it is next turned on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootSource {
    /// What its firmware prefers.
    Default,
    /// The network.
    Network,
}

/// What happened to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// It was turned on.
    On,
    /// It was reset, by its guest or from outside.
    Reset,
    /// It is off: turned off, or ended by itself.
    Off,
}

/// A machine, on or off.
#[derive(Debug)]
pub struct Machine {
    spec: MachineSpec,
    tpm: TpmState,
    console: Console,
    running: Mutex<Option<Running>>,
    /// One power operation at a time.
    operation: tokio::sync::Mutex<()>,
    events: mpsc::UnboundedSender<PowerEvent>,
}

#[derive(Debug, Clone)]
struct Running {
    /// None for a soft machine.
    qmp: Option<Arc<Qmp>>,
    stop: CancellationToken,
    ended: CancellationToken,
}

impl Machine {
    /// Assembles a machine that is off.
    ///
    /// # Errors
    /// Its files cannot be made.
    pub fn assemble(spec: MachineSpec, tpm: TpmState, events: mpsc::UnboundedSender<PowerEvent>) -> Result<Self> {
        std::fs::create_dir_all(&spec.folder).map_err(LabError::io(format!("making {}", spec.folder.display())))?;
        let variables = spec.folder.join(VARIABLES);
        if !variables.exists() {
            std::fs::copy(OVMF_VARS, &variables)
                .map_err(LabError::io(format!("copying {OVMF_VARS} (package ovmf)")))?;
        }
        let console = Console::create(&spec.name, &spec.folder.join("console.log"))?;
        Ok(Self { spec, tpm, console, running: Mutex::default(), operation: tokio::sync::Mutex::default(), events })
    }

    /// Its serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Whether it has power.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.current().is_some()
    }

    /// Turns it on; nothing happens if it is on.
    ///
    /// # Errors
    /// QEMU or swtpm does not start; the error has QEMU's words.
    pub async fn power_on(&self, boot: BootSource) -> Result<()> {
        let _one_at_a_time = self.operation.lock().await;
        if self.is_on() {
            return Ok(());
        }
        let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
        let qmp = match self.spec.execution {
            Execution::Emulated => Some(self.start_qemu(boot, &stop, &ended).await?),
            Execution::Soft => {
                tokio::spawn(watch_soft(self.events.clone(), stop.clone(), ended.clone()));
                None
            }
        };
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(Running { qmp, stop, ended });
        let _nobody_listens = self.events.send(PowerEvent::On);
        Ok(())
    }

    /// Cuts its power; nothing happens if it is off. It is off when this returns.
    pub async fn power_off(&self) {
        let _one_at_a_time = self.operation.lock().await;
        if let Some(running) = self.current() {
            running.stop.cancel();
            running.ended.cancelled().await;
        }
    }

    /// Presses its power button.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub async fn press_power_button(&self) -> Result<()> {
        match self.current() {
            Some(Running { qmp: Some(qmp), .. }) => qmp.execute("system_powerdown", json!({})).await.map(drop),
            Some(Running { qmp: None, stop, .. }) => {
                stop.cancel();
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Resets it, as its reset button would.
    ///
    /// # Errors
    /// It is off, or QEMU does not answer.
    pub async fn reset(&self) -> Result<()> {
        match self.current() {
            Some(Running { qmp: Some(qmp), .. }) => qmp.execute("system_reset", json!({})).await.map(drop),
            Some(Running { qmp: None, .. }) => {
                let _nobody_listens = self.events.send(PowerEvent::Reset);
                Ok(())
            }
            None => Err(LabError::unexpected(format!("resetting {}", self.spec.name), "it is off")),
        }
    }

    fn current(&self) -> Option<Running> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().is_some_and(|r| r.ended.is_cancelled()) {
            *running = None;
        }
        running.clone()
    }

    async fn start_qemu(
        &self,
        boot: BootSource,
        stop: &CancellationToken,
        ended: &CancellationToken,
    ) -> Result<Arc<Qmp>> {
        let tpm = self.tpm.power_on().await?;
        let qmp_socket = self.spec.folder.join("qmp.sock");
        let _was_there = std::fs::remove_file(&qmp_socket);
        let mut child = self.qemu(&tpm, &qmp_socket, boot)?.spawn().map_err(LabError::io("starting QEMU"))?;
        if let Some(stdout) = child.stdout.take() {
            tokio::spawn(self.console.clone().capture(stdout));
        }
        let (qmp, qmp_events) = match self.connect(&qmp_socket, &mut child).await {
            Ok(connected) => connected,
            Err(error) => {
                let _already_dead = child.kill().await;
                return Err(error);
            }
        };
        tokio::spawn(watch(child, tpm, qmp_events, self.events.clone(), stop.clone(), ended.clone()));
        Ok(Arc::new(qmp))
    }

    fn qemu(&self, tpm: &RunningTpm, qmp_socket: &Path, boot: BootSource) -> Result<Command> {
        let words = self.spec.folder.join(QEMU_LOG);
        let words = std::fs::File::create(&words).map_err(LabError::io(format!("creating {}", words.display())))?;
        let mut qemu = self.spec.netns.command("qemu-system-x86_64");
        qemu.args(arguments(&self.spec, &tpm.control_socket, qmp_socket, boot));
        qemu.stdout(std::process::Stdio::piped()).stderr(words);
        Ok(qemu)
    }

    async fn connect(&self, socket: &Path, child: &mut Child) -> Result<(Qmp, mpsc::UnboundedReceiver<QmpEvent>)> {
        let doing = format!("starting the machine {}", self.spec.name);
        let child = tokio::sync::Mutex::new(child);
        let listening = wait_until(&doing, START_LIMIT, || async {
            if socket.exists() { Some(true) } else { child.lock().await.try_wait().ok().flatten().map(|_| false) }
        });
        if !listening.await? {
            let words = std::fs::read_to_string(self.spec.folder.join(QEMU_LOG)).unwrap_or_default();
            return Err(LabError::unexpected(doing, format!("QEMU ended at once: {}", tail(words.trim()))));
        }
        Qmp::connect(socket).await
    }
}

/// Waits for the end of QEMU and passes its events on. Owns the process: whatever ends this ends the machine.
async fn watch(
    mut child: Child,
    tpm: RunningTpm,
    mut qmp_events: mpsc::UnboundedReceiver<QmpEvent>,
    events: mpsc::UnboundedSender<PowerEvent>,
    stop: CancellationToken,
    ended: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => {
                let _already_dead = child.kill().await;
                break;
            }
            _status = child.wait() => break,
            event = qmp_events.recv() => match event {
                Some(QmpEvent::Reset) => drop(events.send(PowerEvent::Reset)),
                Some(QmpEvent::Shutdown | QmpEvent::Other) => {}
                // QEMU hung up: it is about to end.
                None => {
                    let _status = child.wait().await;
                    break;
                }
            },
        }
    }
    drop(tpm);
    let _nobody_listens = events.send(PowerEvent::Off);
    ended.cancel();
}

/// A soft machine is on until it is stopped.
async fn watch_soft(events: mpsc::UnboundedSender<PowerEvent>, stop: CancellationToken, ended: CancellationToken) {
    stop.cancelled().await;
    let _nobody_listens = events.send(PowerEvent::Off);
    ended.cancel();
}

/// QEMU's arguments.
fn arguments(spec: &MachineSpec, tpm: &Path, qmp: &Path, boot: BootSource) -> Vec<OsString> {
    let folder = spec.folder.display();
    let boot_index = match boot {
        BootSource::Default => "",
        BootSource::Network => ",bootindex=0",
    };
    // No option ROM: the firmware's own PXE driver is to speak, and PCR 2 is to stay empty of QEMU's.
    let nic = format!("virtio-net-pci,netdev=net0,mac={},romfile={boot_index}", spec.mac);
    let pairs: [(&str, String); 17] = [
        ("-name", spec.name.clone()),
        ("-machine", "q35,hpet=off".to_owned()),
        ("-accel", "tcg,thread=multi".to_owned()),
        ("-cpu", "qemu64".to_owned()),
        ("-smp", "1".to_owned()),
        ("-m", spec.memory_mib.to_string()),
        ("-display", "none".to_owned()),
        ("-drive", format!("if=pflash,format=raw,unit=0,readonly=on,file={OVMF_CODE}")),
        ("-drive", format!("if=pflash,format=raw,unit=1,file={folder}/{VARIABLES}")),
        ("-chardev", format!("socket,id=tpm0,path={}", tpm.display())),
        ("-tpmdev", "emulator,id=tpm0,chardev=tpm0".to_owned()),
        ("-device", "tpm-crb,tpmdev=tpm0".to_owned()),
        ("-netdev", format!("tap,id=net0,ifname={},script=no,downscript=no", spec.tap)),
        ("-device", nic),
        ("-device", "virtio-rng-pci".to_owned()),
        // The console is QEMU's standard output; control characters in it are the guest's, not ours.
        ("-chardev", "stdio,id=console,signal=off".to_owned()),
        ("-qmp", format!("unix:{},server=on,wait=off", qmp.display())),
    ];
    let mut arguments: Vec<OsString> = vec!["-nodefaults".into(), "-no-user-config".into()];
    arguments.extend(pairs.into_iter().flat_map(|(flag, value)| [flag.into(), value.into()]));
    arguments.extend(["-serial".into(), "chardev:console".into()]);
    arguments
}

/// Version of the emulator, as part of what firmware measurements depend on.
///
/// # Errors
/// QEMU is not installed.
pub async fn emulator_version() -> Result<String> {
    let mut qemu = command("qemu-system-x86_64");
    qemu.arg("--version");
    crate::command::run(qemu, "asking QEMU for its version", START_LIMIT).await
}

/// The firmware.
pub const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// Its variables as they are before the first boot.
pub(crate) const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
const VARIABLES: &str = "variables.fd";
const QEMU_LOG: &str = "qemu.log";
const START_LIMIT: Duration = Duration::from_secs(15);
