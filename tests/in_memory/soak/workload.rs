//! The pods of the soak: what users create, change and delete, drawn from the seed, and what must become of each.
//!
//! The plan never looks at what the agent made of it, so a seed always gives the same pods, changes and deletions at the same virtual moments.

use std::{collections::BTreeMap, time::Duration};

use rkubelet::cri::fake::{ExecScript, FakeRuntime, Script};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::apiserver::{Apiserver, NAMESPACE};

/// splitmix64.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// From `low` to below `high`.
    pub fn from(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.from(0, all.len() as u64) as usize]
    }
    pub fn seconds(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.from(low * 1000, high * 1000))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Runs for ever, ends on SIGTERM after a while.
    Server,
    /// Does not hear SIGTERM; five minutes of grace.
    Stubborn,
    /// Ends again and again.
    Crasher,
    /// OnFailure: fails so often, then succeeds.
    Job { failures: usize },
    /// Never: two containers, each runs once.
    Once { fails: bool },
    /// Two init containers, a sidecar, a main one.
    Initialized,
    /// Startup, liveness and readiness probes that pass, hooks around its life.
    Probed,
    /// Its liveness probe fails.
    Sick,
    /// `activeDeadlineSeconds`.
    Hurried { seconds: u64 },
    /// More CPU than the node has.
    TooBig,
    /// Environment from a configMap.
    Configured { map: u64 },
}

impl Kind {
    fn drawn(dice: &mut Dice) -> Self {
        match dice.from(0, 100) {
            0..22 => Self::Server,
            22..28 => Self::Stubborn,
            28..38 => Self::Crasher,
            38..48 => Self::Job { failures: dice.from(0, 4) as usize },
            48..58 => Self::Once { fails: dice.from(0, 2) == 0 },
            58..72 => Self::Initialized,
            72..82 => Self::Probed,
            82..85 => Self::Sick,
            85..90 => Self::Hurried { seconds: dice.from(30, 600) },
            90..92 => Self::TooBig,
            _ => Self::Configured { map: dice.from(0, MAPS) },
        }
    }

    /// All kinds once: for small worlds.
    pub fn all() -> Vec<Self> {
        vec![
            Self::Server,
            Self::Stubborn,
            Self::Crasher,
            Self::Job { failures: 2 },
            Self::Once { fails: false },
            Self::Once { fails: true },
            Self::Initialized,
            Self::Probed,
            Self::Sick,
            Self::Hurried { seconds: 200 },
            Self::TooBig,
            Self::Configured { map: 1 },
        ]
    }

    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Stubborn => "stubborn",
            Self::Crasher => "crasher",
            Self::Job { .. } => "job",
            Self::Once { .. } => "once",
            Self::Initialized => "initialized",
            Self::Probed => "probed",
            Self::Sick => "sick",
            Self::Hurried { .. } => "hurried",
            Self::TooBig => "toobig",
            Self::Configured { .. } => "configured",
        }
    }

    /// Containers that run for as long as the pod shall: every one exactly once.
    pub fn steady(self) -> &'static [&'static str] {
        match self {
            Self::Server | Self::Stubborn | Self::Probed | Self::Configured { .. } => &["main"],
            Self::Initialized => &["main", "side"],
            _ => &[],
        }
    }

    /// How often each container of a pod that ends by itself runs.
    pub fn runs(self) -> &'static [&'static str] {
        match self {
            Self::Once { .. } => &["first", "second"],
            Self::Job { .. } => &["work"],
            _ => &[],
        }
    }

    pub fn updatable(self) -> bool {
        matches!(self, Self::Server | Self::Initialized | Self::Probed)
    }

    fn spec(self) -> Value {
        let exec = |period: u64| json!({"exec": {"command": ["true"]}, "periodSeconds": period, "failureThreshold": 3});
        let main = |name: &str| json!({"name": name, "image": IMAGES[0]});
        match self {
            Self::Server => json!({"restartPolicy": "Always", "containers": [main("main")]}),
            Self::Stubborn => {
                json!({"restartPolicy": "Always", "terminationGracePeriodSeconds": 300, "containers": [main("main")]})
            }
            Self::Crasher => json!({"restartPolicy": "Always", "containers": [main("crash")]}),
            Self::Job { .. } => json!({"restartPolicy": "OnFailure", "containers": [main("work")]}),
            Self::Once { .. } => json!({"restartPolicy": "Never", "containers": [main("first"), main("second")]}),
            Self::Initialized => json!({
                "restartPolicy": "Always",
                "initContainers": [
                    main("prepare"),
                    {"name": "side", "image": IMAGES[0], "restartPolicy": "Always", "startupProbe": exec(5)},
                    main("migrate"),
                ],
                "containers": [main("main")],
            }),
            Self::Probed => json!({
                "restartPolicy": "Always",
                "containers": [{
                    "name": "main", "image": IMAGES[0],
                    "startupProbe": exec(5), "livenessProbe": exec(60), "readinessProbe": exec(30),
                    "lifecycle": {"postStart": {"exec": {"command": ["a"]}}, "preStop": {"exec": {"command": ["b"]}}},
                }],
            }),
            Self::Sick => json!({
                "restartPolicy": "Always",
                "containers": [{"name": "sick", "image": IMAGES[0], "livenessProbe": exec(20)}],
            }),
            Self::Hurried { seconds } => {
                json!({"restartPolicy": "Always", "activeDeadlineSeconds": seconds, "containers": [main("main")]})
            }
            Self::TooBig => json!({
                "restartPolicy": "Always",
                "containers": [{"name": "main", "image": IMAGES[0], "resources": {"requests": {"cpu": "100"}}}],
            }),
            Self::Configured { map } => json!({
                "restartPolicy": "Always",
                "containers": [{"name": "main", "image": IMAGES[0], "envFrom": [{"configMapRef": {"name": format!("map-{map}")}}]}],
            }),
        }
    }

    fn script(self, runtime: &FakeRuntime, name: &str, dice: &mut Dice) {
        let script = |container: &str, scripts: Vec<Script>| runtime.script(&format!("{name}/{container}"), scripts);
        match self {
            Self::Stubborn => script("main", vec![Script::ignores_term()]),
            Self::Crasher => script("crash", vec![Script::exits(dice.seconds(1, 90), 1)]),
            Self::Job { failures } => {
                let mut runs = vec![Script::exits(dice.seconds(2, 60), 3); failures];
                runs.push(Script::exits(dice.seconds(2, 60), 0));
                script("work", runs);
            }
            Self::Once { fails } => {
                script("first", vec![Script::exits(dice.seconds(1, 300), 0)]);
                script("second", vec![Script::exits(dice.seconds(1, 600), i32::from(fails))]);
            }
            Self::Initialized => {
                script("prepare", vec![Script::exits(dice.seconds(1, 20), 0)]);
                script("migrate", vec![Script::exits(dice.seconds(1, 20), 0)]);
                script("main", vec![Script::term_after(dice.seconds(0, 20), 0)]);
            }
            _ => script("main", vec![Script::term_after(dice.seconds(0, 20), 0)]),
        }
    }
}

const MAPS: u64 = 20;
pub const IMAGES: [&str; 3] = ["busybox:1", "busybox:2", "registry.example/app:7"];

/// What the runtime and the cluster have before any pod.
pub fn furnish(runtime: &FakeRuntime, api: &Apiserver) {
    let sick = ExecScript { exit_code: 1, ..ExecScript::default() };
    runtime.exec_script("sick", sick);
    for map in 0..MAPS {
        let name = format!("map-{map}");
        api.create(
            "configmaps",
            json!({"metadata": {"name": name, "namespace": NAMESPACE, "uid": name}, "data": {"A": "1"}}),
        );
    }
}

/// One pod as its user knows it.
#[derive(Debug, Clone)]
pub struct Planned {
    pub uid: String,
    pub name: String,
    pub kind: Kind,
    pub created: Instant,
    pub image: &'static str,
    /// A container or sandbox of it was taken down from outside.
    pub disturbed: bool,
}

pub struct Workload {
    pub dice: Dice,
    pub live: BTreeMap<String, Planned>,
    /// Deleted pods: UID → name. Emptied at quiet points, when they must be gone.
    pub deleted: Vec<(String, String)>,
    pub created: u64,
    runtime: FakeRuntime,
    api: Apiserver,
}

impl Workload {
    pub fn new(seed: u64, runtime: &FakeRuntime, api: &Apiserver) -> Self {
        Self {
            dice: Dice::new(seed),
            live: BTreeMap::new(),
            deleted: Vec::new(),
            created: 0,
            runtime: runtime.clone(),
            api: api.clone(),
        }
    }

    pub fn create_drawn(&mut self) {
        let kind = Kind::drawn(&mut self.dice);
        self.create(kind, None);
    }

    /// `name`: that of a pod that is being deleted, or was.
    pub fn create(&mut self, kind: Kind, name: Option<String>) {
        self.created += 1;
        let uid = format!("uid-{}", self.created);
        let name = name.unwrap_or_else(|| format!("{}-{}", kind.name(), self.created));
        kind.script(&self.runtime, &name, &mut self.dice);
        let mut spec = kind.spec();
        spec["nodeName"] = json!("n");
        let grace = self.dice.from(1, 60);
        if spec["terminationGracePeriodSeconds"].is_null() {
            spec["terminationGracePeriodSeconds"] = json!(grace);
        }
        self.api.create(
            "pods",
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"uid": uid, "name": name, "namespace": NAMESPACE, "generation": 1, "labels": {"app": kind.name()}},
                "spec": spec,
                "status": {"phase": "Pending", "qosClass": "BestEffort"},
            }),
        );
        let planned =
            Planned { uid, name: name.clone(), kind, created: Instant::now(), image: IMAGES[0], disturbed: false };
        self.live.insert(name, planned);
    }

    fn any(&mut self) -> Option<Planned> {
        if self.live.is_empty() {
            return None;
        }
        let at = self.dice.from(0, self.live.len() as u64) as usize;
        self.live.values().nth(at).cloned()
    }

    /// One thing that a user does, so that there are about `wanted` pods.
    pub fn churn(&mut self, wanted: usize) {
        let Some(pod) = self.any() else { return self.create_drawn() };
        match self.dice.from(0, 100) {
            _ if self.live.len() < wanted * 9 / 10 => self.create_drawn(),
            0..20 if self.live.len() < wanted => self.create_drawn(),
            0..50 => self.delete(&pod.name),
            50..60 => self.force_delete(&pod),
            60..65 => {
                // A StatefulSet does not wait for the node when its pod is forced away.
                self.force_delete(&pod);
                self.create(pod.kind, Some(pod.name));
            }
            65..85 if pod.kind.updatable() => {
                let image = self.dice.one_of(&IMAGES);
                self.api.update(&pod.name, |object| object["spec"]["containers"][0]["image"] = json!(image));
                if let Some(planned) = self.live.get_mut(&pod.name) {
                    planned.image = image;
                }
            }
            _ => {
                let value = self.dice.from(0, 1000).to_string();
                self.api.update(&pod.name, |object| object["metadata"]["labels"]["turn"] = json!(value));
            }
        }
    }

    fn delete(&mut self, name: &str) {
        let Some(pod) = self.live.remove(name) else { return };
        let grace = match pod.kind {
            Kind::Stubborn => self.dice.one_of(&[300, 300, 5]),
            _ => self.dice.from(1, 60),
        };
        self.api.delete(name, grace);
        self.deleted.push((pod.uid, pod.name));
    }

    fn force_delete(&mut self, pod: &Planned) {
        self.live.remove(&pod.name);
        self.api.delete(&pod.name, 0);
        self.deleted.push((pod.uid.clone(), pod.name.clone()));
    }

    pub fn delete_all(&mut self) {
        let names: Vec<String> = self.live.keys().cloned().collect();
        for name in names {
            self.delete(&name);
        }
    }

    /// A pod whose containers something outside shall take down.
    pub fn disturb(&mut self) -> Option<Planned> {
        let name = self.any()?.name;
        let pod = self.live.get_mut(&name)?;
        pod.disturbed = true;
        Some(pod.clone())
    }
}
