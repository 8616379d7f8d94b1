//! Capacity and allocatable, in the formats and by the rules of upstream (contract N-08). Pure.

use super::machine::Machine;
use crate::{
    config::{Signal, Threshold},
    quantity::Quantity,
    resources::ResourceList,
};

/// What the configuration keeps back from pods.
#[derive(Debug, Clone, Default)]
pub struct Reservations {
    pub system_reserved: ResourceList,
    pub kube_reserved: ResourceList,
    /// All thresholds; the hard ones for memory and nodefs space count.
    pub eviction: Vec<Threshold>,
}

/// How many pods the node takes: `maxPods`, or fewer by `podsPerCore`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodSlots {
    pub max_pods: i64,
    /// 0: not set.
    pub pods_per_core: i64,
}

/// Capacity of the node. `ephemeral` is the size in bytes of the root directory's file system: `None` when it is not known (or
/// local storage not isolated), then `ephemeral-storage` is left out.
pub fn capacity(machine: &Machine, ephemeral: Option<i64>, slots: PodSlots) -> ResourceList {
    let mut list = machine_capacity(machine);
    let pods = match slots.pods_per_core {
        0 => slots.max_pods,
        per_core => slots.max_pods.min(machine.cores.saturating_mul(per_core)),
    };
    list.insert("pods".to_owned(), Quantity::from_units(pods));
    if let Some(bytes) = ephemeral {
        list.insert("ephemeral-storage".to_owned(), Quantity::from_units(bytes));
    }
    list
}

fn machine_capacity(machine: &Machine) -> ResourceList {
    let mut list = ResourceList::from([
        ("cpu".to_owned(), Quantity::from_millis(machine.cores.saturating_mul(1000))),
        ("memory".to_owned(), Quantity::from_bytes(machine.memory)),
    ]);
    for pages in &machine.huge_pages {
        let name = format!("hugepages-{}", Quantity::from_bytes(pages.page_size));
        list.insert(name, Quantity::from_bytes(pages.page_size.saturating_mul(pages.pages)));
    }
    list
}

/// Capacity less reservations and hard eviction thresholds; memory also less the huge pages set aside. Never negative.
pub fn allocatable(capacity: &ResourceList, reservations: &Reservations) -> ResourceList {
    let mut list: ResourceList = capacity
        .iter()
        .map(|(name, total)| {
            let eviction = eviction_reservation(name, total, &reservations.eviction);
            (name.clone(), not_negative(reserved(name, reservations).map_or(*total, |r| total.sub(&r)).sub(&eviction)))
        })
        .collect();
    let huge: Vec<Quantity> =
        capacity.iter().filter(|(name, _)| name.starts_with("hugepages-")).map(|(_, amount)| *amount).collect();
    if let Some(memory) = list.get_mut("memory") {
        *memory = huge.iter().fold(*memory, |left, pages| not_negative(left.sub(pages)));
    }
    list
}

/// What the kubepods cgroup is limited to: capacity, with `pid`, less reservations alone. `enforce` false (pods not in
/// `enforceNodeAllocatable`): nothing is subtracted.
pub fn kubepods_allocatable(machine: &Machine, reservations: &Reservations, enforce: bool) -> ResourceList {
    let mut list = machine_capacity(machine);
    if let Some(pids) = machine.max_pids {
        list.insert("pid".to_owned(), Quantity::from_units(pids));
    }
    if enforce {
        for (name, amount) in &mut list {
            if let Some(reserved) = reserved(name, reservations) {
                *amount = not_negative(amount.sub(&reserved));
            }
        }
    }
    list
}

fn reserved(name: &str, reservations: &Reservations) -> Option<Quantity> {
    let system = reservations.system_reserved.get(name);
    let kube = reservations.kube_reserved.get(name);
    match (system, kube) {
        (Some(a), Some(b)) => Some(a.add(b)),
        (one, other) => one.or(other).copied(),
    }
}

fn eviction_reservation(name: &str, total: &Quantity, thresholds: &[Threshold]) -> Quantity {
    let signal = match name {
        "memory" => Signal::MemoryAvailable,
        "ephemeral-storage" => Signal::NodeFsAvailable,
        _ => return Quantity::ZERO,
    };
    let hard = thresholds.iter().rev().find(|t| t.signal == signal && t.grace_period.is_none());
    hard.map_or(Quantity::ZERO, |t| Quantity::from_units(t.value.of(total.value())))
}

fn not_negative(amount: Quantity) -> Quantity {
    if amount.is_negative() { amount.sub(&amount) } else { amount }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::machine::HugePages;

    fn machine() -> Machine {
        Machine {
            cores: 2,
            memory: 24_684_096 * 1024,
            max_pids: Some(1000),
            huge_pages: vec![HugePages { page_size: 2 << 20, pages: 0 }, HugePages { page_size: 1 << 30, pages: 0 }],
            ..Machine::default()
        }
    }

    fn reservations(hard: &[(&str, &str)]) -> Reservations {
        let hard = hard.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let none = Default::default();
        let eviction = crate::config::parse_thresholds(&hard, &none, &none, &none).unwrap();
        Reservations { eviction, ..Reservations::default() }
    }

    fn texts(list: &ResourceList) -> Vec<(String, String)> {
        list.iter().map(|(name, amount)| (name.clone(), amount.to_canonical())).collect()
    }

    const SLOTS: PodSlots = PodSlots { max_pods: 250, pods_per_core: 0 };

    /// The numbers of a Go kubelet 1.37.1 on the machine of `node-sample.json`, which had a 1 % nodefs threshold.
    #[test]
    fn n08_same_numbers_as_the_go_kubelet() {
        let capacity = capacity(&machine(), Some(270_553_174_016), SLOTS);
        let expected = [
            ("cpu", "2"),
            ("ephemeral-storage", "270553174016"),
            ("hugepages-1Gi", "0"),
            ("hugepages-2Mi", "0"),
            ("memory", "24684096Ki"),
            ("pods", "250"),
        ];
        assert_eq!(texts(&capacity), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        let left = allocatable(&capacity, &reservations(&[("memory.available", "100Mi"), ("nodefs.available", "1%")]));
        let expected = [
            ("cpu", "2"),
            ("ephemeral-storage", "267847642337"),
            ("hugepages-1Gi", "0"),
            ("hugepages-2Mi", "0"),
            ("memory", "24581696Ki"),
            ("pods", "250"),
        ];
        assert_eq!(texts(&left), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn n08_reservations_are_subtracted_and_nothing_goes_below_zero() {
        let list = |text: &[(&str, &str)]| -> ResourceList {
            text.iter().map(|(k, v)| ((*k).to_owned(), Quantity::parse(v).unwrap())).collect()
        };
        let reservations = Reservations {
            system_reserved: list(&[("cpu", "500m"), ("memory", "1Gi")]),
            kube_reserved: list(&[("cpu", "250m"), ("pods", "999")]),
            eviction: Vec::new(),
        };
        let left = allocatable(&capacity(&machine(), None, SLOTS), &reservations);
        assert_eq!(left["cpu"].to_canonical(), "1250m");
        assert_eq!(left["memory"].value(), 24_684_096 * 1024 - (1 << 30));
        assert_eq!(left["pods"].to_canonical(), "0");
        assert!(!left.contains_key("ephemeral-storage"));
    }

    #[test]
    fn n08_huge_pages_are_taken_from_memory() {
        let mut machine = machine();
        machine.huge_pages[0].pages = 512;
        let left = allocatable(&capacity(&machine, None, SLOTS), &Reservations::default());
        assert_eq!(left["hugepages-2Mi"].to_canonical(), "1Gi");
        assert_eq!(left["memory"].value(), machine.memory - (1 << 30));
        machine.huge_pages[0].pages = 1 << 40;
        assert!(allocatable(&capacity(&machine, None, SLOTS), &Reservations::default())["memory"].is_zero());
    }

    #[test]
    fn n08_pods_per_core_only_lowers() {
        let pods = |max_pods, pods_per_core| {
            capacity(&machine(), None, PodSlots { max_pods, pods_per_core })["pods"].to_canonical()
        };
        assert_eq!([pods(110, 0), pods(110, 10), pods(15, 10)], ["110", "20", "15"]);
    }

    #[test]
    fn r03_kubepods_keeps_what_eviction_reserves_and_has_pids() {
        let mut reservations = reservations(&[("memory.available", "100Mi")]);
        reservations.kube_reserved.insert("memory".to_owned(), Quantity::parse("1Gi").unwrap());
        reservations.system_reserved.insert("pid".to_owned(), Quantity::parse("100").unwrap());
        let enforced = kubepods_allocatable(&machine(), &reservations, true);
        assert_eq!(enforced["memory"].value(), machine().memory - (1 << 30));
        assert_eq!(enforced["pid"].value(), 900);
        let open = kubepods_allocatable(&machine(), &reservations, false);
        assert_eq!(open["memory"].value(), machine().memory);
    }
}
