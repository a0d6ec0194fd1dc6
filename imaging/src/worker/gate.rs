//! The gate before a unit's device: while it is shut, every command waits, and the device with all its files is closed.
//! So a running disk is snapshotted: who serves it gives it up, and is handed it anew.

use crate::store::device::{BlockDevice, DeviceError, check_range};
use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError};

/// A device that can be closed and exchanged behind the initiator's back.
#[derive(Debug)]
pub(super) struct Gate {
    byte_len: u64,
    /// Held shared by each command.
    behind: RwLock<Behind>,
    shut: Mutex<bool>,
    opened: Condvar,
}

#[derive(Debug)]
struct Behind {
    device: Arc<dyn BlockDevice>,
    shut: bool,
}

/// The device, for the time of one command. A thread holds one at a time: whoever shuts the gate waits for it, and whoever
/// comes after that waits for the gate.
#[derive(Debug)]
pub(super) struct Passed<'a>(RwLockReadGuard<'a, Behind>);

impl Deref for Passed<'_> {
    type Target = dyn BlockDevice;

    fn deref(&self) -> &Self::Target {
        &*self.0.device
    }
}

/// What is behind a gate that is shut: nobody passes to it.
#[derive(Debug)]
struct Closed;

impl BlockDevice for Closed {
    fn byte_len(&self) -> u64 {
        0
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
        check_range(offset, buffer.len() as u64, 0)
    }

    fn try_read_at(&self, _offset: u64, _buffer: &mut [u8]) -> Result<bool, DeviceError> {
        Ok(false)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Why a gate does not open.
#[derive(Debug, thiserror::Error)]
#[error("the disk had {was} octets, and was handed over anew with {now}")]
pub(super) struct OtherSize {
    was: u64,
    now: u64,
}

impl Gate {
    pub(super) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            byte_len: device.byte_len(),
            behind: RwLock::new(Behind { device, shut: false }),
            shut: Mutex::new(false),
            opened: Condvar::new(),
        }
    }

    /// The device's size, which stays.
    pub(super) fn byte_len(&self) -> u64 {
        self.byte_len
    }

    /// The device, after the gate has opened if it is shut.
    pub(super) fn pass(&self) -> Passed<'_> {
        loop {
            let behind = self.behind.read().unwrap_or_else(PoisonError::into_inner);
            if !behind.shut {
                return Passed(behind);
            }
            drop(behind);
            drop(self.opened.wait_while(self.is_shut(), |shut| *shut));
        }
    }

    /// The device, if that needs no waiting.
    pub(super) fn pass_now(&self) -> Option<Passed<'_>> {
        // Whoever shuts the gate holds the lock while it flushes.
        let behind = match self.behind.try_read() {
            Ok(behind) => behind,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        (!behind.shut).then_some(Passed(behind))
    }

    /// Lets what is under way end, makes it durable, and closes the device. What fails leaves the gate open.
    pub(super) fn shut(&self) -> Result<(), DeviceError> {
        let mut behind = self.behind.write().unwrap_or_else(PoisonError::into_inner);
        if !behind.shut {
            behind.device.flush()?;
            *self.is_shut() = true;
            *behind = Behind { device: Arc::new(Closed), shut: true };
        }
        Ok(())
    }

    /// Lets commands through, to `device` from now on.
    pub(super) fn open(&self, device: Arc<dyn BlockDevice>) -> Result<(), OtherSize> {
        let (was, now) = (self.byte_len, device.byte_len());
        if was != now {
            return Err(OtherSize { was, now });
        }
        *self.behind.write().unwrap_or_else(PoisonError::into_inner) = Behind { device, shut: false };
        *self.is_shut() = false;
        self.opened.notify_all();
        Ok(())
    }

    fn is_shut(&self) -> MutexGuard<'_, bool> {
        self.shut.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Zeros, and whether somebody still has them open.
    #[derive(Debug)]
    struct Zeros(u64);

    impl BlockDevice for Zeros {
        fn byte_len(&self) -> u64 {
            self.0
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DeviceError> {
            check_range(offset, buffer.len() as u64, self.0)?;
            buffer.fill(0);
            Ok(())
        }
        fn try_read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<bool, DeviceError> {
            self.read_at(offset, buffer).map(|()| true)
        }
        fn flush(&self) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    #[test]
    fn a_shut_gate_holds_commands_and_has_closed_its_device() {
        let device: Arc<dyn BlockDevice> = Arc::new(Zeros(4096));
        let gate = Arc::new(Gate::new(Arc::clone(&device)));
        assert!(gate.pass_now().is_some());
        gate.shut().unwrap();
        gate.shut().unwrap();
        assert_eq!(Arc::strong_count(&device), 1, "it has the device no more");
        assert!(gate.pass_now().is_none());
        let (done, read) = mpsc::channel();
        let waiting = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            let mut buffer = [1; 512];
            waiting.pass().read_at(0, &mut buffer).unwrap();
            done.send(buffer).unwrap();
        });
        assert!(read.recv_timeout(Duration::from_millis(50)).is_err(), "it passed a gate that is shut");
        assert!(gate.open(Arc::new(Zeros(512))).unwrap_err().to_string().contains("4096"));
        gate.open(device).unwrap();
        assert_eq!(read.recv_timeout(Duration::from_secs(5)).unwrap(), [0; 512]);
        thread.join().unwrap();
    }

    #[test]
    fn a_gate_shuts_once_what_is_under_way_has_ended() {
        let gate = Arc::new(Gate::new(Arc::new(Zeros(4096))));
        let under_way = gate.pass();
        let shutting = Arc::clone(&gate);
        let (done, shut) = mpsc::channel();
        let thread = std::thread::spawn(move || done.send(shutting.shut().is_ok()).unwrap());
        assert!(shut.recv_timeout(Duration::from_millis(50)).is_err(), "it did not wait for a command");
        drop(under_way);
        assert!(shut.recv_timeout(Duration::from_secs(5)).unwrap());
        thread.join().unwrap();
    }
}
