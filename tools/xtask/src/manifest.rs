//! As much of a `Cargo.toml` as the rules need. Every manifest here is written in the plain form
//! (`name.workspace = true`), so reading lines is enough.

/// A dependency, and whether it is one of tests only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) is_dev: bool,
}

/// What a crate declares.
#[derive(Debug, Default)]
pub(crate) struct Manifest {
    pub(crate) name: String,
    pub(crate) dependencies: Vec<Dependency>,
    /// Whether it takes the workspace's lints.
    pub(crate) has_lints: bool,
}

impl Manifest {
    pub(crate) fn parse(text: &str) -> Self {
        let mut manifest = Self::default();
        let mut section = "";
        for line in text.lines().map(str::trim) {
            if let Some(header) = line.strip_prefix('[') {
                section = header.split(']').next().unwrap_or("").trim();
                // `[dependencies.name]` is the long form of a line in `[dependencies]`.
                if let Some((kind, name)) = section.rsplit_once("dependencies.") {
                    manifest.depend(name, kind.ends_with("dev-"));
                    section = "";
                }
                continue;
            }
            let Some((key, value)) = line.split_once('=') else { continue };
            let (key, value) = (key.trim(), value.trim());
            match section {
                "package" if key == "name" => {
                    value.trim_matches('"').clone_into(&mut manifest.name)
                }
                "lints" if key == "workspace" => manifest.has_lints = value == "true",
                _ if section.ends_with("dependencies") && !key.starts_with('#') => {
                    let name = key.split('.').next().unwrap_or(key);
                    manifest.depend(name, section.ends_with("dev-dependencies"));
                }
                _ => {}
            }
        }
        manifest
    }

    fn depend(&mut self, name: &str, is_dev: bool) {
        let name = name.trim_matches('"').to_owned();
        self.dependencies.push(Dependency { name, is_dev });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_of_a_dependency_are_read() {
        let manifest = Manifest::parse(
            "[package]\nname = \"a\"\n[lints]\nworkspace = true\n[dependencies]\n# x = 1\n\
             b.workspace = true\nc = { version = \"1\" }\n[dependencies.d]\nversion = \"1\"\n\
             [build-dependencies]\ne = \"1\"\n[target.'cfg(unix)'.dependencies]\nf = \"1\"\n\
             [dev-dependencies]\ng = \"1\"\n[dev-dependencies.h]\nversion = \"1\"\n\
             [features]\ni = []\n",
        );
        let names = |is_dev| -> Vec<&str> {
            let chosen = manifest.dependencies.iter().filter(|d| d.is_dev == is_dev);
            chosen.map(|dependency| dependency.name.as_str()).collect()
        };
        assert_eq!((manifest.name.as_str(), manifest.has_lints), ("a", true));
        assert_eq!(names(false), ["b", "c", "d", "e", "f"]);
        assert_eq!(names(true), ["g", "h"]);
    }
}
