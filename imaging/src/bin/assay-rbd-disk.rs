//! `assay-rbd-disk`: one disk on Ceph, for one export's process. Started for each connection of a gateway's, never by hand.
//! See [`assay_imaging::rbd_disk`].

fn main() -> std::process::ExitCode {
    assay_imaging::rbd_disk::main()
}
