//! What an image or a disk is made of: the images below it, and whether one is a snapshot of another.
//!
//! The holder of a disk's key can write to the disk's header, so what a header says of a disk's parent is believed only
//! where the parent's own header, which no key may write, has the disk among its clones.

use super::RbdStore;
use crate::header::Header;
use crate::keys::{GoldenScope, Scope};
use crate::name::{ImageKind, ImageName, ImageObjectId, Namespace, PoolName};
use crate::{Image, ImageLink, ParentImage, RbdError};
use std::fmt;
use std::rc::Rc;

/// Images between a disk and its golden image: each makes a read of what is not there dearer.
pub(super) const MOST_LAYERS: usize = 8;
/// Metadata of a disk that is becoming an image, and of an image that was one: see [`Taking`].
const TAKING: &str = "assay.taking";
/// In the place of a count in it.
const UNCOUNTED: &str = "-";

/// What an image or a disk reads what it has not from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Below {
    /// Next first, the golden image last.
    pub layers: Vec<ParentImage>,
    /// Its name; none if nothing is below.
    pub golden: Option<ImageName>,
}

impl RbdStore {
    /// What is below an image or a disk, which is open.
    ///
    /// # Errors
    /// A header names a parent that is not its own, or Ceph refuses.
    pub fn below(&self, open: &Image) -> Result<Below, RbdError> {
        let layers = self.layers(open)?;
        let golden = layers.last().map(|lowest| lowest.name);
        Ok(Below { layers: layered(&self.pool, scopes(&layers)), golden })
    }

    /// What reads an image, by way of others too. But not the disk that it is a snapshot of, and what was made of that since:
    /// to whoever took it, neither depends on the other.
    pub(super) fn readers(&self, image: &Image) -> Result<Vec<ImageLink>, RbdError> {
        let own = match Taking::of(image)? {
            Some(Taking::Done { clone, .. }) => Some(clone),
            Some(Taking::UnderWay { .. }) | None => None,
        };
        let mut next = image.children()?;
        next.retain(|child| own.as_ref().is_none_or(|own| child.id != own.as_str()));
        let mut readers = Vec::new();
        while let Some(child) = next.pop() {
            let kind = ImageName::parse(&child.name).map(ImageName::kind);
            // A disk has no clones: its node, which can spoil its header, is nobody's way into this.
            if kind.is_some_and(|kind| kind != ImageKind::Disk)
                && let (Ok(namespace), Ok(id)) = (Namespace::new(&child.namespace), ImageObjectId::new(&child.id))
            {
                let pool = self.cluster.namespace(&self.pool, &namespace)?;
                match pool.open_by_id(&id, None).and_then(|open| open.children()) {
                    Ok(children) => next.extend(children),
                    // Its space was given back just now, which nobody does who has clones.
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => return Err(error),
                }
            }
            // One without a name is in no directory any more.
            if !child.in_trash && !child.name.is_empty() {
                readers.push(child);
            }
        }
        Ok(readers)
    }

    /// The parent that an image's header names (`named`) and whose own header has it among its clones.
    fn parent_of(
        &self,
        image: &ImageObjectId,
        path: &str,
        named: Option<(ImageLink, u64)>,
    ) -> Result<Option<Parent>, RbdError> {
        let Some((parent, snapshot)) = named else { return Ok(None) };
        let wrong = || RbdError::WrongParent {
            object: path.to_owned(),
            found: parent.to_string(),
            expected: "an image that has it among its clones".to_owned(),
        };
        let (Ok(namespace), Ok(id)) = (Namespace::new(&parent.namespace), ImageObjectId::new(&parent.id)) else {
            return Err(wrong());
        };
        if parent.pool != self.pool.as_str() {
            return Err(wrong());
        }
        let name = ImageName::parse(&parent.name).ok_or_else(wrong)?;
        // At the snapshot: what that has below it counts.
        let header = self.cluster.namespace(&self.pool, &namespace)?.header(id, Some(snapshot));
        if !header.has_child(image)? {
            return Err(wrong());
        }
        Ok(Some(Parent { namespace, name, header }))
    }

    /// All that an image reads what it has not from, next first, the golden image last.
    pub(super) fn layers(&self, image: &Image) -> Result<Vec<Rc<Parent>>, RbdError> {
        Ancestors::of(self, image)?.collect()
    }
}

/// How far a disk's becoming an image is. A disk's node can write there, so of a disk it only says what to look at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taking {
    /// The disk becomes the image, and is not there again yet.
    UnderWay { disk: ImageName, image: ImageName },
    /// Done: the disk is the image's clone with that id. What the image's own objects take is counted later.
    Done { clone: ImageObjectId, own_bytes: Option<u64> },
}

impl Taking {
    pub(super) fn of(image: &Image) -> Result<Option<Self>, RbdError> {
        Ok(image.metadata(TAKING)?.as_deref().and_then(Self::parse))
    }

    fn in_header(header: &Header) -> Result<Option<Self>, RbdError> {
        Ok(header.metadata(TAKING)?.as_deref().and_then(Self::parse))
    }

    pub(super) fn write(&self, header: &Header) -> Result<(), RbdError> {
        header.set_metadata(TAKING, &self.to_string())
    }

    fn parse(text: &str) -> Option<Self> {
        let (first, second) = text.split_once(' ')?;
        if let (Some(disk), Some(image)) = (ImageName::parse(first), ImageName::parse(second)) {
            let fits = disk.kind() == ImageKind::Disk && image.kind() == ImageKind::Golden;
            return fits.then_some(Self::UnderWay { disk, image });
        }
        let own_bytes = if second == UNCOUNTED { None } else { Some(second.parse().ok()?) };
        Some(Self::Done { clone: ImageObjectId::new(first).ok()?, own_bytes })
    }
}

impl fmt::Display for Taking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnderWay { disk, image } => write!(f, "{disk} {image}"),
            Self::Done { clone, own_bytes: Some(own_bytes) } => write!(f, "{clone} {own_bytes}"),
            Self::Done { clone, own_bytes: None } => write!(f, "{clone} {UNCOUNTED}"),
        }
    }
}

/// The image that another one is a clone of.
pub(super) struct Parent {
    pub(super) namespace: Namespace,
    pub(super) name: ImageName,
    /// At the snapshot that the other is a clone of.
    pub(super) header: Header,
}

/// The images below one, each looked at when it is asked for.
pub(super) struct Ancestors<'a> {
    store: &'a RbdStore,
    last: Option<Rc<Parent>>,
    next: Option<Parent>,
    count: usize,
    path: String,
}

impl<'a> Ancestors<'a> {
    pub(super) fn of(store: &'a RbdStore, image: &Image) -> Result<Self, RbdError> {
        let next = store.parent_of(&image.id()?, image.path(), image.parent()?)?;
        Ok(Self { store, last: None, next, count: 0, path: image.path().to_owned() })
    }
}

impl Iterator for Ancestors<'_> {
    type Item = Result<Rc<Parent>, RbdError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = match (self.next.take(), self.last.take().as_deref()) {
            (Some(first), _) => first,
            (None, Some(Parent { header, .. })) => {
                let named = header.parent();
                match named.and_then(|named| self.store.parent_of(header.id(), &header.path(), named)) {
                    Ok(next) => next?,
                    Err(error) => return Some(Err(error)),
                }
            }
            (None, None) => return None,
        };
        self.count += 1;
        if self.count > MOST_LAYERS {
            return Some(Err(RbdError::ChainTooLong { object: self.path.clone(), layers: self.count }));
        }
        let next = Rc::new(next);
        self.last = Some(Rc::clone(&next));
        Some(Ok(next))
    }
}

/// The image that an image's disk, or a disk, was made from: its parent, but for those that are snapshots of itself.
pub(super) fn made_from(
    mut child: ImageObjectId,
    ancestors: impl Iterator<Item = Result<Rc<Parent>, RbdError>>,
) -> Result<Option<ImageName>, RbdError> {
    let mut name = None;
    for parent in ancestors {
        let parent = parent?;
        name = Some(parent.name);
        match Taking::in_header(&parent.header)? {
            Some(Taking::Done { clone, .. }) if clone == child => child = parent.header.id().clone(),
            Some(_) | None => break,
        }
    }
    Ok(name)
}

pub(super) fn scopes(layers: &[Rc<Parent>]) -> Vec<GoldenScope> {
    let scope = |parent: &Rc<Parent>| {
        let (namespace, id) = (parent.namespace.clone(), parent.header.id().clone());
        GoldenScope { namespace, id }
    };
    layers.iter().map(scope).collect()
}

fn layered(pool: &PoolName, layers: Vec<GoldenScope>) -> Vec<ParentImage> {
    let layer = |GoldenScope { namespace, id }| ParentImage { pool: pool.clone(), namespace, id };
    layers.into_iter().map(layer).collect()
}

/// A disk's node could give its header another size.
pub(super) fn check_size(disk: &Image, golden: Option<&Parent>) -> Result<(), RbdError> {
    match golden.map(|golden| golden.header.byte_len()).transpose()? {
        Some(below) if below != disk.byte_len() => {
            let detail = format!("has {} octets, the image below it has {below}", disk.byte_len());
            Err(RbdError::Malformed { object: disk.path().to_owned(), detail })
        }
        Some(_) | None => Ok(()),
    }
}

impl Scope {
    /// What is below the disk, as [`crate::CloneDisk::open`] takes it.
    #[must_use]
    pub fn layers(&self) -> Vec<ParentImage> {
        layered(&self.pool, self.golden.clone())
    }
}
