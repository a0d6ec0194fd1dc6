//! `qemu-lab`: the lab's command line.

use assay_qemu_lab::ceph::StoreKind;
use assay_qemu_lab::error::{LabError, Result};
use assay_qemu_lab::events::{self, Event, EventLog};
use assay_qemu_lab::fleet::FleetArguments;
use assay_qemu_lab::image;
use assay_qemu_lab::sandbox;
use assay_qemu_lab::scenario::{Bench, BenchOptions, Scenario, Stage};
use assay_qemu_lab::site::Site;
use assay_qemu_lab::steps::{BootSteps, Progress};
use assay_qemu_lab::topology::Topology;
use clap::{Parser, Subcommand};
use serde_json::json;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Real firmware, a real switch, real TPMs and the real services, on one machine.
#[derive(Debug, Parser)]
#[command(name = "qemu-lab", version, about)]
struct Arguments {
    /// Where the lab keeps its files.
    #[arg(long, default_value = "target/lab", global = true)]
    folder: PathBuf,
    /// Topology to build; the built-in one has two nodes and one project.
    #[arg(long, global = true)]
    topology: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the boot path: a good node reaches its tenant's Debian, a tampered one is refused.
    Run(BenchArguments),
    /// Play one scenario.
    Scenario {
        /// Which.
        #[arg(value_enum)]
        scenario: Scenario,
        /// How often to measure, where something is measured.
        #[arg(long, default_value_t = 5)]
        runs: u32,
        #[command(flatten)]
        bench: BenchArguments,
    },
    /// Build the site and keep it up until Ctrl-C or `qemu-lab down`.
    Up {
        /// Only switch, TPMs, nodes and BMCs; no services.
        #[arg(long)]
        hardware_only: bool,
        #[command(flatten)]
        bench: BenchArguments,
    },
    /// End the lab that `up` keeps up.
    Down,
    /// Follow a node's serial console.
    Console {
        /// The node.
        node: String,
    },
    /// Tell a run again from its events, and where it broke.
    Replay {
        /// An `events.jsonl`.
        file: PathBuf,
    },
    /// Drive a fleet of soft nodes against a real verifier, and measure it.
    Fleet(FleetArguments),
    /// Build images.
    Image {
        #[command(subcommand)]
        image: ImageCommand,
    },
}

#[derive(Debug, clap::Args)]
struct BenchArguments {
    /// Folder of the agent's image, as `make agent-image` leaves it.
    #[arg(long, default_value = "target/agent-image")]
    agent_image: PathBuf,
    /// Where images, and policies learnt, are kept between runs.
    #[arg(long, default_value = "target/lab-cache")]
    cache: PathBuf,
    /// Where images and disks are; a scenario that shows Ceph uses Ceph.
    #[arg(long, value_enum, default_value_t = StoreKind::Local)]
    store: StoreKind,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// The tenant's golden image: a small Debian 12 with the agent.
    Tenant(BenchArguments),
    /// The system that tries disks out: fio and multipath.
    Workbench(BenchArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let needs_namespaces = match arguments.command {
        Command::Run(_) | Command::Scenario { .. } | Command::Up { .. } => true,
        Command::Down
        | Command::Console { .. }
        | Command::Replay { .. }
        | Command::Fleet(_)
        | Command::Image { .. } => false,
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(source) => return failed(&LabError::Io { doing: "starting the runtime".to_owned(), source }),
    };
    if needs_namespaces && !sandbox::is_inside() {
        // What needs the world's network comes first: inside, there is none.
        let entered = runtime.block_on(async {
            prepare(&arguments).await?;
            record_pid(&arguments.folder)?;
            sandbox::enter().await
        });
        return entered.unwrap_or_else(|error| failed(&error));
    }
    match runtime.block_on(run(arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

async fn prepare(arguments: &Arguments) -> Result<()> {
    match &arguments.command {
        Command::Scenario { scenario: Scenario::Multipath, bench, .. } => {
            image::workbench(&bench.cache, say).await.map(drop)
        }
        Command::Scenario { scenario, .. } if scenario.stage() != Stage::Services => Ok(()),
        Command::Run(bench) | Command::Scenario { bench, .. } | Command::Up { hardware_only: false, bench } => {
            image::tenant(&bench.cache, &bench.agent_image, say).await.map(drop)
        }
        Command::Up { hardware_only: true, .. }
        | Command::Down
        | Command::Console { .. }
        | Command::Replay { .. }
        | Command::Fleet(_)
        | Command::Image { .. } => Ok(()),
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    let folder = std::path::absolute(&arguments.folder).map_err(LabError::io("finding the lab's folder"))?;
    let topology = match (&arguments.topology, &arguments.command) {
        (Some(path), _) => Topology::read(path)?,
        (None, Command::Scenario { scenario, .. }) => scenario.topology(),
        (None, _) => Topology::built_in(),
    };
    match arguments.command {
        Command::Run(bench) => play(Scenario::Run, 1, topology, &folder, &bench).await,
        Command::Scenario { scenario, runs, bench } => match scenario.stage() {
            Stage::Services => play(scenario, runs, topology, &folder, &bench).await,
            Stage::Hardware => play_on_hardware(scenario, topology, &folder).await,
            Stage::Target => play_on_target(scenario, &folder, &bench).await,
        },
        Command::Up { hardware_only: true, .. } => up_hardware(topology, &folder).await,
        Command::Up { hardware_only: false, bench } => up(topology, &folder, &bench).await,
        Command::Down => down(&folder),
        Command::Console { node } => follow_console(&folder, &node).await,
        Command::Replay { file } => replay(&file),
        Command::Fleet(fleet) => {
            say(&fleet.run(&folder).await?);
            Ok(())
        }
        Command::Image { image: ImageCommand::Tenant(bench) } => {
            image::tenant(&bench.cache, &bench.agent_image, say).await.map(drop)
        }
        Command::Image { image: ImageCommand::Workbench(bench) } => image::workbench(&bench.cache, say).await.map(drop),
    }
}

async fn play(
    scenario: Scenario,
    runs: u32,
    topology: Topology,
    folder: &Path,
    arguments: &BenchArguments,
) -> Result<()> {
    sandbox::prepare().await?;
    let options = options(topology, folder, arguments, scenario).await?;
    let mut bench = Bench::build(options, say).await?;
    let played = tokio::select! {
        played = scenario.play(&mut bench, runs) => played,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.map_err(LabError::io("waiting for Ctrl-C"))?;
            Err(LabError::unexpected("playing the scenario", "interrupted"))
        }
    };
    if let Err(error) = &played {
        bench.events.lab("scenario.failed", &json!({ "error": error.chain() }));
        say(&format!("events and consoles of this run are in {}", folder.display()));
    } else {
        bench.events.lab("scenario.passed", &json!({}));
    }
    tell_steps(&bench.events.since(0));
    played?;
    say(&format!(
        "\nNext: `qemu-lab up` keeps such a site up; `qemu-lab replay {0}/events.jsonl` tells this run again;\n\
         `qemu-lab console n1` shows what the node said.",
        folder.display()
    ));
    Ok(())
}

async fn play_on_hardware(scenario: Scenario, topology: Topology, folder: &Path) -> Result<()> {
    sandbox::prepare().await?;
    let events = EventLog::create(&folder.join("events.jsonl"))?;
    let site = Site::build(topology, folder, &events).await?;
    scenario.play_on_hardware(&site, &events).await?;
    events.lab("scenario.passed", &json!({}));
    Ok(())
}

async fn play_on_target(scenario: Scenario, folder: &Path, arguments: &BenchArguments) -> Result<()> {
    sandbox::prepare().await?;
    std::fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))?;
    let events = EventLog::create(&folder.join("events.jsonl"))?;
    let cache = absolute(&arguments.cache)?;
    let agent_image = absolute(&arguments.agent_image)?;
    scenario.play_on_target(folder, &cache, &agent_image, &events).await?;
    events.lab("scenario.passed", &json!({}));
    Ok(())
}

async fn up(topology: Topology, folder: &Path, arguments: &BenchArguments) -> Result<()> {
    sandbox::prepare().await?;
    let options = options(topology, folder, arguments, Scenario::Attest).await?;
    let bench = Bench::build(options, say).await?;
    bench.trust_the_firmware().await?;
    bench.events.lab("lab.up", &json!({}));
    let state = bench.services.state_folder();
    say(&format!(
        "the site is up; Ctrl-C or `qemu-lab down` ends it. In another terminal:\n  \
         export ASSAY_SITE={}\n  nsenter --target $(pgrep -P $(cat {}/{PID_FILE})) --net --mount --pid -- \
         target/debug/assay node list",
        state.display(),
        folder.display()
    ));
    tokio::signal::ctrl_c().await.map_err(LabError::io("waiting for Ctrl-C"))
}

async fn up_hardware(topology: Topology, folder: &Path) -> Result<()> {
    sandbox::prepare().await?;
    let events = EventLog::create(&folder.join("events.jsonl"))?;
    let site = Site::build(topology, folder, &events).await?;
    for (name, node) in &site.nodes {
        let login = folder.join("nodes").join(name).join("bmc.json");
        let bmc = json!({ "url": node.bmc.url, "system": node.bmc.system_url(), "username": node.bmc.username,
            "password": node.bmc.password, "ca_pem": node.bmc.ca_pem });
        std::fs::write(&login, bmc.to_string()).map_err(LabError::io(format!("writing {}", login.display())))?;
        say(&format!("node {name}: off; BMC at {}; its login is in {}", node.bmc.system_url(), login.display()));
    }
    events.lab("lab.up", &json!({}));
    say("the site is up, without services; Ctrl-C or `qemu-lab down` ends it");
    tokio::signal::ctrl_c().await.map_err(LabError::io("waiting for Ctrl-C"))
}

async fn options(
    topology: Topology,
    folder: &Path,
    arguments: &BenchArguments,
    scenario: Scenario,
) -> Result<BenchOptions> {
    let cache = absolute(&arguments.cache)?;
    // Made before the namespaces were entered: this finds it.
    let agent_image = absolute(&arguments.agent_image)?;
    let tenant_image = image::tenant(&cache, &agent_image, |_| {}).await?;
    let (tampered_nodes, pace) = (scenario.tampered_nodes(), scenario.pace());
    let store = scenario.store().unwrap_or(arguments.store);
    let folder = folder.to_owned();
    Ok(BenchOptions { folder, cache, agent_image, tenant_image, topology, tampered_nodes, pace, store })
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(LabError::io(format!("finding {}", path.display())))
}

fn tell_steps(events: &[Event]) {
    let mut nodes: Vec<&str> = events.iter().filter_map(Event::node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    for node in nodes {
        let steps = BootSteps::read(node, events);
        say(&format!("\n{}", steps.table()));
        if let Some(total) = steps.total_ms() {
            say(&format!("{node}: {:.1} s from power-on to the tenant's answer", total / 1000.0));
        }
    }
}

fn down(folder: &Path) -> Result<()> {
    let path = folder.join(PID_FILE);
    let doing = format!("ending the lab of {}", folder.display());
    let text = std::fs::read_to_string(&path).map_err(LabError::io(format!("{doing}: reading {}", path.display())))?;
    let pid: i32 = text.trim().parse().map_err(|_| LabError::unexpected(&*doing, "its pid file holds no number"))?;
    // The number may have been given to another process since: only a lab is ours to end.
    let command_line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if command_line.contains("qemu-lab") {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)
            .map_err(|errno| LabError::unexpected(&*doing, errno))?;
    }
    std::fs::remove_file(&path).map_err(LabError::io(format!("removing {}", path.display())))?;
    say("the lab is down");
    Ok(())
}

async fn follow_console(folder: &Path, node: &str) -> Result<()> {
    let path = folder.join("nodes").join(node).join("console.log");
    if !path.exists() {
        return Err(LabError::unexpected(format!("following the console of {node}"), "it has said nothing yet"));
    }
    let mut tail = assay_qemu_lab::command::command("tail");
    let status = tail.args(["-n", "+1", "-f"]).arg(&path).status().await;
    status.map(drop).map_err(LabError::io(format!("following {}", path.display())))
}

fn replay(file: &Path) -> Result<()> {
    let events = events::read(file)?;
    for event in &events {
        let at = event.text("timestamp").unwrap_or("-");
        say(&format!("{at}  {:<24} {}", event.name(), event.node().unwrap_or("")));
    }
    let mut nodes: Vec<&str> = events.iter().filter_map(Event::node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    for node in nodes {
        let steps = BootSteps::read(node, &events);
        say(&steps.table().to_string());
        say(&match steps.progress() {
            Progress::Complete => format!("{node}: all nine steps, in order"),
            Progress::Missing(step) => format!("{node}: stopped before step {} ({step})", step.number()),
            Progress::OutOfOrder(step) => format!("{node}: step {} ({step}) came too early", step.number()),
        });
    }
    Ok(())
}

/// Remembers the process that holds the namespaces: this one, once it has become `unshare`.
fn record_pid(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(LabError::io(format!("making {}", folder.display())))?;
    let path = folder.join(PID_FILE);
    std::fs::write(&path, std::process::id().to_string()).map_err(LabError::io(format!("writing {}", path.display())))
}

fn say(line: &str) {
    // Nobody reads on: nothing to do about it.
    let _closed = writeln!(std::io::stdout().lock(), "{line}");
}

fn failed(error: &LabError) -> ExitCode {
    let _closed = writeln!(std::io::stderr().lock(), "qemu-lab: {}", error.chain());
    ExitCode::FAILURE
}

const PID_FILE: &str = "lab.pid";
