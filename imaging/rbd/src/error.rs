//! Why Ceph did not do it: what was being done, to which object, and the error number.

use crate::ImageLink;
use crate::ffi::Errno;
use std::io;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum RbdError {
    /// Ceph's libraries are not installed, or too old.
    #[error("loading {library} (Debian package {package})")]
    Library {
        /// The shared library.
        library: &'static str,
        /// The package that has it.
        package: &'static str,
        /// Why the dynamic linker refused.
        #[source]
        source: libloading::Error,
    },
    /// Ceph, or its library, refused.
    #[error("{doing} {object}")]
    Ceph {
        /// What was being done.
        doing: &'static str,
        /// To which pool, namespace, image, snapshot or user.
        object: String,
        /// The error number.
        #[source]
        source: io::Error,
    },
    /// Not all of the range lies on the image.
    #[error("{length} octets at {offset} are not within {object} of {byte_len} octets")]
    OutOfRange {
        /// The image.
        object: String,
        /// Where the range starts.
        offset: u64,
        /// How long it is.
        length: u64,
        /// How large the image is.
        byte_len: u64,
    },
    /// It was opened for reading.
    #[error("{object} is open for reading only")]
    ReadOnly {
        /// The image.
        object: String,
    },
    /// A monitor's answer is not what was asked for.
    #[error("{object} {detail}")]
    Malformed {
        /// What was read.
        object: String,
        /// What is wrong with it, continuing the sentence that the object begins.
        detail: String,
    },
    /// An image with clones is not removed.
    #[error("{object} has clones: {}", children.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    HasChildren {
        /// The image.
        object: String,
        /// Its clones, and theirs.
        children: Vec<ImageLink>,
    },
    /// Somebody has it open.
    #[error("{object} is open at {}", clients.join(", "))]
    InUse {
        /// The image.
        object: String,
        /// The addresses of those who have.
        clients: Vec<String>,
    },
    /// Every read of what is not there would pass through too many images.
    #[error("{object} stands on {layers} images, and may on no more")]
    ChainTooLong {
        /// The image.
        object: String,
        /// How many.
        layers: usize,
    },
    /// There is an image of that name.
    #[error("{object} is there already")]
    Exists {
        /// The image.
        object: String,
    },
    /// An image's parent is not the one that it was cloned from: whoever held its key has rewritten its header.
    #[error("{object} is a clone of {found}, not of {expected}")]
    WrongParent {
        /// The clone.
        object: String,
        /// Its parent as its header says.
        found: String,
        /// Its parent as the caller knows.
        expected: String,
    },
    /// What a key may do was not shown on this release.
    #[error("the cluster requires Ceph release `{release}`, on which keys cut to one clone were not shown to hold")]
    UnknownRelease {
        /// As the cluster calls it.
        release: String,
    },
    /// A local file.
    #[error("{doing} {object}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// The file.
        object: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Whoever asked broke the work off.
    #[error("{doing} {object} was broken off")]
    BrokenOff {
        /// What was being done.
        doing: &'static str,
        /// To which object.
        object: String,
    },
}

impl RbdError {
    pub(crate) fn ceph(doing: &'static str, object: impl ToString) -> impl FnOnce(Errno) -> Self {
        let object = object.to_string();
        move |errno| Self::Ceph { doing, object, source: io::Error::from_raw_os_error(errno.0) }
    }

    /// The error number, where Ceph gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Ceph { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// There is no such object. A key that may not know also gets this, or [`RbdError::is_denied`].
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(Errno::NOT_FOUND.0)
    }

    /// The key may not do that.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        matches!(self.errno(), Some(1 | 13))
    }

    /// Whoever was asked did not answer in time.
    #[must_use]
    pub fn is_no_answer(&self) -> bool {
        self.errno() == Some(110)
    }

    /// This client's address is blocklisted: nothing that it sends is carried out any more.
    #[must_use]
    pub fn is_blocklisted(&self) -> bool {
        // librados calls it EBLOCKLISTED, which is ESHUTDOWN.
        self.errno() == Some(108)
    }
}
