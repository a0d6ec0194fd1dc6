//! A small Redfish BMC (DSP0266) for each node: HTTPS, basic authentication, one system that it really turns on and
//! off. [`system`] decides; [`server`] speaks HTTP and moves the machine.

pub mod server;
pub mod system;
