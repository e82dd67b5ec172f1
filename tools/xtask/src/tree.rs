//! The workspace as the rules see it: its crates, their manifests and their Rust files.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use crate::manifest::Manifest;

/// Folders that hold crates, and whether the folder is itself one (`cli`) or holds several.
const PLACES: &[(&str, bool)] = &[
    ("crates", false),
    ("services", false),
    ("tests", false),
    ("tools", false),
    ("cli", true),
    ("bench", true),
];

/// One crate.
#[derive(Debug)]
pub(crate) struct Crate {
    /// Folder, relative to the root: `crates/types`.
    pub(crate) dir: String,
    pub(crate) manifest: Manifest,
    pub(crate) files: Vec<File>,
}

/// One Rust file.
#[derive(Debug)]
pub(crate) struct File {
    /// Path, relative to the root.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Reads all crates below `root`, in the order of their paths.
///
/// # Errors
/// A file that cannot be read, or is not UTF-8.
pub(crate) fn read(root: &Path) -> anyhow::Result<Vec<Crate>> {
    let mut dirs = Vec::new();
    for (place, is_crate) in PLACES {
        if *is_crate {
            dirs.push((*place).to_owned());
        } else {
            dirs.extend(names(&root.join(place))?.iter().map(|name| format!("{place}/{name}")));
        }
    }
    dirs.retain(|dir| root.join(dir).join("Cargo.toml").is_file());
    dirs.sort();
    let mut crates = Vec::new();
    for dir in dirs {
        let path = root.join(&dir).join("Cargo.toml");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut files = Vec::new();
        rust_files(root, &dir, &mut files)?;
        crates.push(Crate { dir, manifest: Manifest::parse(&text), files });
    }
    Ok(crates)
}

fn rust_files(root: &Path, dir: &str, files: &mut Vec<File>) -> anyhow::Result<()> {
    for name in names(&root.join(dir))? {
        let path = format!("{dir}/{name}");
        let full = root.join(&path);
        if full.is_dir() {
            if name != "target" && !name.starts_with('.') {
                rust_files(root, &path, files)?;
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&full).with_context(|| path.clone())?;
            files.push(File { path, text });
        }
    }
    Ok(())
}

fn names(dir: &Path) -> anyhow::Result<Vec<String>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
