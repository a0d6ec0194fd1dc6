//! `assay-export`: one export's process. Started by a gateway, never by hand. See [`assay_imaging::worker`].

fn main() -> std::process::ExitCode {
    assay_imaging::worker::main()
}
