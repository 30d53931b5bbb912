//! The module trees of the library (`mlxd`) and of the binary (`main`), parsed from their sources, and every
//! path that their code mentions: imports, inline paths, attributes and what stands in macros. A path
//! resolves to an absolute one: through `crate`, `self`, `super`, imports, re-exports and globs.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Span, TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, Meta, UseTree, Visibility};

/// Files by their path from the root of the repository.
pub(super) type Sources = BTreeMap<String, String>;

/// Segments of a path. An absolute one starts with `mlxd`, `main` or the name of an external crate.
pub(super) type Path = Vec<String>;

/// Re-exports that a path may lead through.
const HOPS_MAX: usize = 12;

/// One module: a file, a folder's `mod.rs`, or an inline module.
#[derive(Default)]
pub(super) struct Module {
    pub(super) file: String,
    /// Functions and values: a path ends with them.
    values: BTreeSet<String>,
    /// Other items: a path may lead through them.
    types: BTreeSet<String>,
    imports: BTreeMap<String, Path>,
    globs: Vec<Path>,
}

/// A path in the code, as it is written.
pub(super) struct Mention {
    pub(super) module: Path,
    pub(super) line: usize,
    pub(super) path: Path,
    /// Only compiled for tests.
    pub(super) test: bool,
    /// A `pub use`: the module shows it and may not need it.
    pub(super) shown: bool,
}

/// Both crates.
#[derive(Default)]
pub(super) struct Tree {
    pub(super) modules: BTreeMap<Path, Module>,
    pub(super) mentions: Vec<Mention>,
    /// What could not be parsed or found.
    pub(super) faults: Vec<String>,
    externs: BTreeSet<String>,
}

impl Tree {
    /// Parses `src/lib.rs`, `src/main.rs` and every module that they declare. `externs` are the names of the
    /// external crates.
    pub(super) fn read(sources: &Sources, externs: &[&str]) -> Self {
        let std = ["std", "core", "alloc"];
        let externs = externs.iter().chain(&std).map(|name| (*name).to_owned()).collect();
        let mut tree = Self { externs, ..Self::default() };
        for (root, file) in [("mlxd", "src/lib.rs"), ("main", "src/main.rs")] {
            if sources.contains_key(file) {
                tree.read_file(sources, file, vec![root.to_owned()], false);
            }
        }
        let read: BTreeSet<&str> = tree.modules.values().map(|module| module.file.as_str()).collect();
        let lost = sources.keys().filter(|file| file.starts_with("src/") && !read.contains(file.as_str()));
        let lost: Vec<String> = lost.map(|file| format!("{file}: no module declares it")).collect();
        tree.faults.extend(lost);
        tree
    }

    fn read_file(&mut self, sources: &Sources, file: &str, module: Path, test: bool) {
        let Some(text) = sources.get(file) else {
            self.faults.push(format!("{file}: declared as a module, but missing"));
            return;
        };
        let parsed = match syn::parse_file(text) {
            Ok(parsed) => parsed,
            Err(error) => {
                self.faults.push(format!("{file}: {error}"));
                return;
            }
        };
        let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
        let own = match name {
            "mod.rs" | "lib.rs" | "main.rs" => folder.to_owned(),
            _ => file.trim_end_matches(".rs").to_owned(),
        };
        let place = Place { file: file.to_owned(), folder: folder.to_owned(), own };
        self.modules.insert(module.clone(), Module { file: file.to_owned(), ..Module::default() });
        let mut reader = Reader { tree: self, sources, place, module, test, shown: false };
        for attribute in &parsed.attrs {
            reader.visit_attribute(attribute);
        }
        for item in &parsed.items {
            reader.visit_item(item);
        }
    }

    /// The absolute form of a path that stands in `module`; `None` for a local name.
    pub(super) fn absolute(&self, module: &[String], path: &[String]) -> Option<Path> {
        self.lookup(module, path, HOPS_MAX)
    }

    fn lookup(&self, module: &[String], path: &[String], hops: usize) -> Option<Path> {
        let hops = hops.checked_sub(1)?;
        let (first, rest) = path.split_first()?;
        match first.as_str() {
            "crate" => return Some(join(&module[..1], rest)),
            "self" => return Some(join(module, rest)),
            "super" => {
                let mut above = &module[..module.len().checked_sub(1)?];
                let mut rest = rest;
                while let Some(("super", deeper)) =
                    rest.split_first().map(|(first, rest)| (first.as_str(), rest))
                {
                    above = &above[..above.len().checked_sub(1)?];
                    rest = deeper;
                }
                return Some(join(above, rest));
            }
            "mlxd" => return Some(path.to_vec()),
            _ => {}
        }
        if let Some(found) = self.member(module, first, rest.is_empty(), hops) {
            return Some(join(&found, rest));
        }
        self.externs.contains(first).then(|| path.to_vec())
    }

    /// A name in the scope of `module`: its own, an imported one or one that a glob brings in. `last`: the
    /// path ends with it.
    fn member(&self, module: &[String], name: &str, last: bool, hops: usize) -> Option<Path> {
        let hops = hops.checked_sub(1)?;
        let inside = join(module, &[name.to_owned()]);
        let known = self.modules.get(module)?;
        if self.modules.contains_key(&inside)
            || known.types.contains(name)
            || last && known.values.contains(name)
        {
            return Some(inside);
        }
        if let Some(import) = known.imports.get(name)
            && import.first().is_none_or(|first| first != name || import.len() > 1)
        {
            // `use name::…` imports that name itself: it can only be a crate.
            return match import.first() {
                Some(first) if first == name => self.externs.contains(name).then(|| import.clone()),
                _ => self.lookup(module, import, hops),
            };
        }
        known.globs.iter().find_map(|glob| {
            let target = self.lookup(module, glob, hops)?;
            self.member(&target, name, last, hops)
        })
    }

    /// The module that defines what an absolute path names, re-exports followed. `None` outside both crates.
    pub(super) fn home(&self, path: &[String]) -> Option<Path> {
        let mut path = path.to_vec();
        for _ in 0..HOPS_MAX {
            let depth = (1..=path.len()).rev().find(|depth| self.modules.contains_key(&path[..*depth]))?;
            let (module, rest) = path.split_at(depth);
            let Some((name, rest)) = rest.split_first() else { return Some(path) };
            match self.member(module, name, rest.is_empty(), HOPS_MAX) {
                Some(found) if found != join(module, std::slice::from_ref(name)) => path = join(&found, rest),
                _ => return Some(module.to_vec()),
            }
        }
        None
    }
}

fn join(start: &[String], rest: &[String]) -> Path {
    start.iter().chain(rest).cloned().collect()
}

/// Where a file lies, and the folder of the modules that it declares.
#[derive(Clone)]
struct Place {
    file: String,
    folder: String,
    own: String,
}

struct Reader<'a> {
    tree: &'a mut Tree,
    sources: &'a Sources,
    place: Place,
    module: Path,
    test: bool,
    shown: bool,
}

impl Reader<'_> {
    fn mention(&mut self, path: Path, span: Span) {
        let (module, line) = (self.module.clone(), span.start().line);
        self.tree.mentions.push(Mention { module, line, path, test: self.test, shown: self.shown });
    }

    fn here(&mut self) -> Option<&mut Module> {
        self.tree.modules.get_mut(&self.module)
    }

    fn import(&mut self, tree: &UseTree, start: &[String]) {
        let below = |ident: &syn::Ident| join(start, &[ident.to_string()]);
        match tree {
            UseTree::Path(path) => self.import(&path.tree, &below(&path.ident)),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(tree, start)),
            UseTree::Name(name) if name.ident == "self" => {
                self.leaf(start.last().cloned(), start, name.ident.span());
            }
            UseTree::Name(name) => {
                self.leaf(Some(name.ident.to_string()), &below(&name.ident), name.ident.span());
            }
            UseTree::Rename(rename) => {
                let path = if rename.ident == "self" { start.to_vec() } else { below(&rename.ident) };
                self.leaf(Some(rename.rename.to_string()), &path, rename.ident.span());
            }
            UseTree::Glob(glob) => {
                if let Some(module) = self.here() {
                    module.globs.push(start.to_vec());
                }
                self.mention(start.to_vec(), glob.star_token.spans[0]);
            }
        }
    }

    fn leaf(&mut self, name: Option<String>, path: &[String], span: Span) {
        if let (Some(name), Some(module)) = (name, self.here()) {
            module.imports.insert(name, path.to_vec());
        }
        self.mention(path.to_vec(), span);
    }

    /// Paths in tokens that nobody parses, as in a macro's call.
    fn scan(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let is_colon =
            |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == ':');
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            at += 1;
            match token {
                TokenTree::Group(group) => self.scan(group.stream()),
                TokenTree::Ident(first) => {
                    let mut path = vec![first.to_string()];
                    while is_colon(at) && is_colon(at + 1) {
                        let Some(TokenTree::Ident(next)) = tokens.get(at + 2) else { break };
                        path.push(next.to_string());
                        at += 3;
                    }
                    if path.len() > 1 {
                        self.mention(path, first.span());
                    }
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    fn submodule(&mut self, item: &syn::ItemMod) {
        let name = item.ident.to_string();
        let module = join(&self.module, std::slice::from_ref(&name));
        if let Some((_, items)) = &item.content {
            let inner = Module { file: self.place.file.clone(), ..Module::default() };
            self.tree.modules.insert(module.clone(), inner);
            let outer = std::mem::replace(&mut self.module, module);
            let own = format!("{}/{name}", self.place.own);
            let own = std::mem::replace(&mut self.place.own, own);
            items.iter().for_each(|item| self.visit_item(item));
            (self.module, self.place.own) = (outer, own);
            return;
        }
        let file = match path_attribute(&item.attrs) {
            Some(path) => straight(&format!("{}/{path}", self.place.folder)),
            None => {
                let (file, folder) =
                    (format!("{}/{name}.rs", self.place.own), format!("{}/{name}/mod.rs", self.place.own));
                if self.sources.contains_key(&file) { file } else { folder }
            }
        };
        self.tree.read_file(self.sources, &file, module, self.test);
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast Item) {
        let (attributes, name) = head(item);
        let before = self.test;
        self.test |= attributes.iter().any(is_for_tests);
        if let (Some(name), Some(module)) = (name, self.here()) {
            let value = matches!(item, Item::Fn(_) | Item::Const(_) | Item::Static(_));
            if value {
                module.values.insert(name)
            } else {
                module.types.insert(name)
            };
        }
        match item {
            Item::Mod(item) => self.submodule(item),
            Item::Use(item) => {
                self.shown = !matches!(item.vis, Visibility::Inherited);
                self.import(&item.tree, &[]);
                self.shown = false;
            }
            item => visit::visit_item(self, item),
        }
        self.test = before;
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Path = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if let Some(first) = path.segments.first().filter(|_| segments.len() > 1) {
            self.mention(segments, first.ident.span());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_path(&call.path);
        self.scan(call.tokens.clone());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        self.visit_path(attribute.path());
        if let Meta::List(list) = &attribute.meta {
            self.scan(list.tokens.clone());
        }
    }
}

/// An item's attributes, and its name if paths can lead to it.
fn head(item: &Item) -> (&[Attribute], Option<String>) {
    match item {
        Item::Const(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Enum(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Fn(item) => (&item.attrs, Some(item.sig.ident.to_string())),
        Item::Impl(item) => (&item.attrs, None),
        Item::Macro(item) => (&item.attrs, item.ident.as_ref().map(ToString::to_string)),
        Item::Mod(item) => (&item.attrs, None),
        Item::Static(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Struct(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Trait(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Type(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Union(item) => (&item.attrs, Some(item.ident.to_string())),
        Item::Use(item) => (&item.attrs, None),
        _ => (&[], None),
    }
}

/// `#[cfg(test)]`, and other conditions that name tests.
fn is_for_tests(attribute: &Attribute) -> bool {
    let Meta::List(list) = &attribute.meta else { return false };
    let names_tests = |token: TokenTree| matches!(token, TokenTree::Ident(name) if name == "test");
    list.path.is_ident("cfg") && list.tokens.clone().into_iter().any(names_tests)
}

/// A path without `..`.
fn straight(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        if part == ".." {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts.join("/")
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    attributes.iter().find_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("path") => match &pair.value {
            syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(text), .. }) => Some(text.value()),
            _ => None,
        },
        _ => None,
    })
}
