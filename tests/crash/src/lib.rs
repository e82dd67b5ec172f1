//! Real processes, killed at any instant. What the crash tests share: file system images made by
//! programs nobody here wrote, and byte-for-byte comparison.

pub mod collector;
pub mod nbd;
pub mod traces;

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use endio_testkit::process::{host_has, run, sparse_file, workspace};
use endio_testkit::seed::Rng;

/// Logical size of an image: far more than its data, so that thin provisioning shows.
pub const IMAGE_BYTES: u64 = 2 << 30;

/// An ext4 image made by `mke2fs -d`.
#[derive(Debug)]
pub struct Image {
    /// The file.
    pub path: PathBuf,
}

impl Image {
    /// Makes a sparse image with about `mib` MiB of files in it: the sources of this workspace and
    /// generated ones. `None`: this host has no `mke2fs` or `e2fsck`.
    ///
    /// # Errors
    /// `mke2fs` fails, or the disk is full.
    pub fn make(directory: &Path, mib: u64, seed: u64) -> anyhow::Result<Option<Self>> {
        if !host_has("mke2fs") || !host_has("e2fsck") {
            return Ok(None);
        }
        let tree = directory.join("tree");
        fs::create_dir(&tree)?;
        for part in ["crates", "proto", "services"] {
            copy_tree(&workspace().join(part), &tree.join(part))?;
        }
        let mut rng = Rng::new(seed);
        let mut left = mib << 20;
        let mut number = 0;
        while left > 0 {
            let length = rng.between(1, 8 << 20).min(left);
            let bytes = rng.bytes(usize::try_from(length)?);
            fs::write(tree.join(format!("generated-{number}")), bytes)?;
            left -= length;
            number += 1;
        }
        sparse_file(&tree.join("sparse"), 512 << 20)?;
        let path = directory.join("image");
        sparse_file(&path, IMAGE_BYTES)?;
        run(mke2fs().args(["-q", "-t", "ext4", "-F", "-d"]).arg(&tree).arg(&path))?;
        fs::remove_dir_all(&tree)?;
        Ok(Some(Self { path }))
    }

    /// Bytes that occupy space.
    ///
    /// # Errors
    /// From the file system.
    pub fn data_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.path.metadata()?.blocks() * 512)
    }
}

fn mke2fs() -> Command {
    let mut command = Command::new("mke2fs");
    command.env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin:/usr/local/sbin:/usr/local/bin");
    command
}

/// Insists that the file system on `image` is clean.
///
/// # Errors
/// It is not; with what `e2fsck` says.
pub fn fsck(image: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("e2fsck");
    command.env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin:/usr/local/sbin:/usr/local/bin");
    run(command.arg("-fn").arg(image)).map(drop)
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if entry.file_type()?.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Insists that two files are the same to the last byte.
///
/// # Errors
/// Where they first differ.
pub fn same_bytes(left: &Path, right: &Path) -> anyhow::Result<()> {
    let (mut one, mut two) = (File::open(left)?, File::open(right)?);
    let (long, short) = (one.metadata()?.len(), two.metadata()?.len());
    ensure!(long == short, "{} has {long} bytes, {} has {short}", left.display(), right.display());
    let mut buffers = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < long {
        let length = usize::try_from((long - at).min(1 << 20))?;
        one.read_exact(&mut buffers.0[..length])?;
        two.read_exact(&mut buffers.1[..length])?;
        if buffers.0[..length] != buffers.1[..length] {
            let differs = |(one, two): (&u8, &u8)| one != two;
            let within = buffers.0.iter().zip(&buffers.1).position(differs).unwrap_or(0);
            let first = at + within as u64;
            let (expected, found) = (buffers.0[within], buffers.1[within]);
            anyhow::bail!("byte {first}: {expected:#x} became {found:#x}");
        }
        at += length as u64;
    }
    Ok(())
}

/// The path as text.
///
/// # Errors
/// It is not UTF-8.
pub fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path of these tests is UTF-8")
}
