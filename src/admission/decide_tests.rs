//! Every reason with its message, the order of the checks, preemption, and what must hold for any pods.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    Candidate, Decision, Occupant, Policy, SysctlAllowlist, admit,
    demand::Demand,
    fixtures::{CRITICAL, asking, full, named, node, pod},
};
use crate::{
    node::{NodeFacts, Pressure},
    pods::{Pod, PodUid},
};

fn policy() -> Policy {
    Policy {
        sysctls: SysctlAllowlist::new("6.12", &[]).unwrap(),
        app_armor: false,
        pod_level_resources: true,
        taint_comparison: false,
        declared_features: BTreeSet::new(),
    }
}

fn decide_with(pod: &Pod, node: &NodeFacts, others: &[Occupant], policy: &Policy) -> Decision {
    admit(&Candidate { pod, running: false }, node, &others.iter().collect::<Vec<_>>(), policy)
}

fn decide(pod: &Pod, node: &NodeFacts, others: &[Occupant]) -> Decision {
    decide_with(pod, node, others, &policy())
}

/// `reason: message`, or nothing when it is admitted at once.
fn said(decision: &Decision) -> String {
    match decision {
        Decision::Admitted => String::new(),
        Decision::Rejected { rejection, .. } => format!("{}: {}", rejection.reason, rejection.message),
        other => format!("{other:?}"),
    }
}

fn holding(pods: &[Pod]) -> Vec<Occupant> {
    pods.iter().cloned().map(Occupant::new).collect()
}

fn requesting(requests: Value) -> Pod {
    pod(json!({"containers": [{"name": "c", "resources": {"requests": requests}}]}))
}

#[test]
fn a01_each_resource_that_is_short_is_told_with_its_numbers() {
    let held = holding(&[named(
        "held",
        json!({"containers": [{"name": "c", "resources":
            {"requests": {"cpu": "700m", "memory": "512Mi", "ephemeral-storage": "8Gi", "x.com/gpu": "1"}}}]}),
    )]);
    let short = |resource: &str, requested: i64, used: i64, capacity: i64| {
        format!(
            "OutOf{resource}: Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    };
    for (requests, expected) in [
        (json!({"cpu": "300m", "memory": "512Mi", "ephemeral-storage": "2Gi", "x.com/gpu": "1"}), String::new()),
        (json!({"cpu": "301m"}), short("cpu", 301, 700, 1000)),
        (json!({"cpu": "1100m"}), short("cpu", 1100, 700, 1000)),
        (json!({"memory": "513Mi"}), short("memory", 513 << 20, 512 << 20, 1 << 30)),
        (json!({"ephemeral-storage": "3Gi"}), short("ephemeral-storage", 3 << 30, 8 << 30, 10 << 30)),
        (json!({"x.com/gpu": "2"}), short("x.com/gpu", 2, 1, 2)),
        (json!({"hugepages-2Mi": "2Mi"}), short("hugepages-2Mi", 2 << 20, 0, 0)),
        // Nobody on this node looks after it: not the node's business.
        (json!({"y.com/card": "9"}), String::new()),
        (json!({"cpu": "2", "memory": "2Gi"}), short("cpu", 2000, 700, 1000)),
    ] {
        assert_eq!(said(&decide(&requesting(requests.clone()), &node(), &held)), expected, "{requests}");
    }
    let full = holding(&["a", "b", "c", "d"].map(|uid| asking(uid, 0, 0)));
    assert_eq!(said(&decide(&asking("e", 2000, 0), &node(), &full)), short("pods", 1, 4, 4), "pods come first");
    assert_eq!(said(&decide(&asking("e", 0, 0), &node(), &full[..3])), "");
}

#[test]
fn a01_p61_overhead_counts() {
    let with = |overhead: &str| {
        pod(json!({"overhead": {"cpu": overhead},
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "900m"}}}]}))
    };
    assert_eq!(said(&decide(&with("100m"), &node(), &[])), "");
    assert!(said(&decide(&with("101m"), &node(), &[])).contains("requested: 1001"));
    let held = holding(&[with("100m")]);
    assert!(said(&decide(&asking("b", 1, 0), &node(), &held)).contains("used: 1000"));
}

fn affinity(terms: Value) -> Pod {
    let required = json!({"nodeSelectorTerms": terms});
    pod(json!({"containers": [],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}))
}

fn expression(key: &str, operator: &str, values: Value) -> Pod {
    affinity(json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]))
}

#[test]
fn a02_selector_and_affinity() {
    const NO: &str = "NodeAffinity: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
    let field = |operator: &str, value: &str| {
        affinity(json!([{"matchFields": [{"key": "metadata.name", "operator": operator, "values": [value]}]}]))
    };
    for (pod, matches) in [
        (pod(json!({"containers": [], "nodeSelector": {"zone": "a"}})), true),
        (pod(json!({"containers": [], "nodeSelector": {"zone": "b"}})), false),
        (pod(json!({"containers": [], "nodeSelector": {"zone": "a", "none": ""}})), false),
        (expression("zone", "In", json!(["b", "a"])), true),
        (expression("zone", "In", json!(["b"])), false),
        (expression("zone", "NotIn", json!(["a"])), false),
        (expression("none", "NotIn", json!(["a"])), true),
        (expression("zone", "NotIn", json!([])), false),
        (expression("zone", "Exists", json!([])), true),
        (expression("none", "Exists", json!([])), false),
        (expression("none", "DoesNotExist", json!([])), true),
        (expression("zone", "DoesNotExist", json!([])), false),
        (expression("rank", "Gt", json!(["4"])), true),
        (expression("rank", "Gt", json!(["5"])), false),
        (expression("rank", "Lt", json!(["6"])), true),
        (expression("zone", "Lt", json!(["6"])), false),
        (expression("zone", "Like", json!(["a"])), false),
        (affinity(json!([])), false),
        (affinity(json!([{}])), false),
        (affinity(json!([{}, {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}])), true),
        (field("In", "node1"), true),
        (field("In", "node2"), false),
        (field("NotIn", "node2"), true),
    ] {
        let decision = decide(&pod, &node(), &[]);
        assert_eq!(said(&decision), if matches { "" } else { NO }, "{:?}", pod.spec());
        assert!(matches || matches!(decision, Decision::Rejected { labels_decide: true, .. }));
    }
    let two = pod(json!({"nodeName": "other", "nodeSelector": {"zone": "b"}, "containers": []}));
    assert!(matches!(decide(&two, &node(), &[]), Decision::Rejected { labels_decide: false, .. }));
}

#[test]
fn a02_name_ports_and_taints() {
    let bound = |name: &str| pod(json!({"nodeName": name, "containers": []}));
    assert_eq!(said(&decide(&bound("node1"), &node(), &[])), "");
    assert_eq!(
        said(&decide(&bound("other"), &node(), &[])),
        "NodeName: Predicate NodeName failed: node(s) didn't match the requested node name"
    );

    let port = |uid: &str, ip: &str, protocol: &str, port: i32| {
        let port = json!({"containerPort": 1, "hostPort": port, "hostIP": ip, "protocol": protocol});
        named(uid, json!({"containers": [{"name": "c", "ports": [port]}]}))
    };
    let held = holding(&[port("held", "10.0.0.1", "TCP", 80)]);
    for (ip, protocol, number, free) in [
        ("10.0.0.1", "TCP", 80, false),
        ("", "", 80, false),
        ("0.0.0.0", "TCP", 80, false),
        ("10.0.0.2", "TCP", 80, true),
        ("10.0.0.1", "UDP", 80, true),
        ("10.0.0.1", "TCP", 81, true),
        ("10.0.0.1", "TCP", 0, true),
    ] {
        let expected =
            "NodePorts: Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        let told = said(&decide(&port("new", ip, protocol, number), &node(), &held));
        assert_eq!(told, if free { "" } else { expected }, "{ip} {protocol} {number}");
    }

    let mut tainted = node();
    let taints = json!([{"key": "k", "value": "v", "effect": "NoExecute"}, {"key": "s", "effect": "NoSchedule"}]);
    tainted.taints = serde_json::from_value(taints).unwrap();
    let tolerating = |toleration: Value| pod(json!({"containers": [], "tolerations": [toleration]}));
    for (toleration, tolerated) in [
        (json!({"key": "k", "operator": "Exists"}), true),
        (json!({"key": "k", "value": "v"}), true),
        (json!({"key": "k", "value": "w"}), false),
        (json!({"key": "k", "value": "v", "effect": "NoSchedule"}), false),
        (json!({"operator": "Exists"}), true),
        (json!({"key": "other", "operator": "Exists"}), false),
    ] {
        let expected =
            "TaintToleration: Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate";
        let told = said(&decide(&tolerating(toleration.clone()), &tainted, &[]));
        assert_eq!(told, if tolerated { "" } else { expected }, "{toleration}");
    }
    let object = json!({"metadata": {"name": "s", "uid": "s"}, "spec": {"containers": []}});
    let fixed =
        Pod::new(serde_json::from_value(object).unwrap(), crate::pods::PodSource::File, jiff::Timestamp::UNIX_EPOCH);
    assert_eq!(said(&decide(&fixed.unwrap(), &tainted, &[])), "", "static pods tolerate all");
}

#[test]
fn a02_numeric_tolerations_need_their_gate() {
    let mut tainted = node();
    tainted.taints = serde_json::from_value(json!([{"key": "k", "value": "5", "effect": "NoExecute"}])).unwrap();
    let on = Policy { taint_comparison: true, ..policy() };
    for (operator, value, tolerated) in
        [("Lt", "6", true), ("Lt", "5", false), ("Gt", "4", true), ("Gt", "x", false), ("Gt", "04", false)]
    {
        let toleration = json!([{"key": "k", "operator": operator, "value": value}]);
        let pod = pod(json!({"containers": [], "tolerations": toleration}));
        assert_eq!(decide_with(&pod, &tainted, &[], &on) == Decision::Admitted, tolerated, "{operator} {value}");
        assert!(said(&decide(&pod, &tainted, &[])).starts_with("TaintToleration"), "the gate is off");
    }
}

#[test]
fn a03_another_operating_system() {
    let labelled = |os: &str| {
        full(
            json!({"metadata": {"name": "p", "uid": "u", "labels": {"kubernetes.io/os": os}}, "spec": {"containers": []}}),
        )
    };
    assert_eq!(said(&decide(&labelled("linux"), &node(), &[])), "");
    assert_eq!(
        said(&decide(&labelled("windows"), &node(), &[])),
        "PodOSSelectorNodeLabelDoesNotMatch: Failed to admit pod as the `kubernetes.io/os` label doesn't match node label"
    );
    assert_eq!(said(&decide(&pod(json!({"os": {"name": "linux"}, "containers": []})), &node(), &[])), "");
    assert_eq!(
        said(&decide(&pod(json!({"os": {"name": "windows"}, "containers": []})), &node(), &[])),
        "PodOSNotSupported: Failed to admit pod as the OS field doesn't match node OS"
    );
}

#[test]
fn a06_a07_a09_a12_what_the_node_does_not_allow_or_have() {
    let sysctl =
        pod(json!({"containers": [], "securityContext": {"sysctls": [{"name": "kernel.shmmax", "value": "1"}]}}));
    let confined = pod(json!({"containers": [], "securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}));
    let strict = pod(json!({"containers": [], "securityContext": {"supplementalGroupsPolicy": "Strict"}}));
    let merge = pod(json!({"containers": [], "securityContext": {"supplementalGroupsPolicy": "Merge"}}));
    let pod_level = pod(json!({"containers": [], "resources": {"requests": {"cpu": "1m"}}}));
    let userns = pod(json!({"containers": [], "hostNetwork": true, "hostUsers": false}));
    let off = Policy { pod_level_resources: false, ..policy() };
    for (pod, policy, expected) in [
        (&sysctl, policy(), "SysctlForbidden: forbidden sysctl: \"kernel.shmmax\" not allowlisted"),
        (&confined, policy(), "AppArmor: Cannot enforce AppArmor: AppArmor is not enabled on the host"),
        (&confined, Policy { app_armor: true, ..policy() }, ""),
        (
            &strict,
            policy(),
            "SupplementalGroupsPolicyNotSupported: SupplementalGroupsPolicy=Strict is not supported in this node",
        ),
        (&merge, policy(), ""),
        (&pod_level, policy(), ""),
        (&pod_level, off, "PodLevelResourcesNotSupported: PodLevelResources feature gate is disabled"),
        (
            &userns,
            policy(),
            "PodFeatureUnsupported: Pod requires node features that are not available: UserNamespacesHostNetworkSupport",
        ),
        (&userns, Policy { declared_features: ["UserNamespacesHostNetworkSupport"].into(), ..policy() }, ""),
    ] {
        assert_eq!(said(&decide_with(pod, &node(), &[], &policy)), expected);
    }
    let able = NodeFacts { supplemental_groups_policy: true, ..node() };
    assert_eq!(said(&decide(&strict, &able, &[])), "");
}

#[test]
fn a08_a_node_under_pressure() {
    let burstable = asking("b", 1, 0);
    let best_effort = asking("e", 0, 0);
    let tolerant = pod(json!({"containers": [{"name": "c"}],
        "tolerations": [{"key": "node.kubernetes.io/memory-pressure", "operator": "Exists", "effect": "NoSchedule"}]}));
    let critical = asking("c", 0, CRITICAL);
    for (pressures, names, turned_away) in [
        (vec![Pressure::Memory], "MemoryPressure", [false, true, false, false]),
        (vec![Pressure::Disk], "DiskPressure", [true, true, true, false]),
        (vec![Pressure::Pid], "PIDPressure", [true, true, true, false]),
        (vec![Pressure::Disk, Pressure::Memory], "MemoryPressure DiskPressure", [true, true, true, false]),
    ] {
        let pressed = NodeFacts { pressures: pressures.into_iter().collect(), ..node() };
        for (pod, away) in [&burstable, &best_effort, &tolerant, &critical].into_iter().zip(turned_away) {
            let expected = format!("Evicted: The node had condition: [{names}]. ");
            assert_eq!(said(&decide(pod, &pressed, &[])), if away { expected } else { String::new() }, "{pod:?}");
        }
    }
}

#[test]
fn r26_a_pod_that_runs_is_not_asked_for_what_it_has() {
    let port = json!([{"containerPort": 1, "hostPort": 80}]);
    let spec = json!({"nodeSelector": {"zone": "a"}, "securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "c", "ports": port, "resources": {"requests": {"cpu": "2"}}}]});
    let (one, other) = (named("one", spec.clone()), named("other", spec));
    let mut node = NodeFacts { pressures: [Pressure::Disk].into(), ..node() };
    let held = Occupant::new(other);
    let running = |node: &NodeFacts| admit(&Candidate { pod: &one, running: true }, node, &[&held], &policy());
    assert_eq!(running(&node), Decision::Admitted);
    node.labels.clear();
    assert!(said(&running(&node)).starts_with("NodeAffinity"), "but the node must still be one for it");
}

fn preempted(decision: &Decision) -> Vec<&str> {
    match decision {
        Decision::Preempt { victims, .. } => victims.iter().map(|uid| uid.as_str()).collect(),
        other => panic!("{other:?}"),
    }
}

fn guaranteed(uid: &str, millis: i64) -> Pod {
    let amounts = json!({"cpu": format!("{millis}m"), "memory": "1Mi"});
    named(
        uid,
        json!({"priority": 0, "containers": [{"name": "c", "resources": {"requests": amounts, "limits": amounts}}]}),
    )
}

#[test]
fn a11_the_fewest_and_least_protected_make_room() {
    let critical = |millis| asking("critical", millis, CRITICAL);
    let held = holding(&[guaranteed("g", 400), asking("b1", 300, 0), asking("b2", 200, 0), asking("e", 0, 0)]);
    let mut roomy = node();
    roomy.allocatable.insert("pods".into(), "9".into());
    for (millis, victims) in [
        (200, vec!["b2"]),
        (300, vec!["b2"]),
        (310, vec!["b1"]),
        (450, vec!["b1", "b2"]),
        (700, vec!["b2", "g"]),
        (1000, vec!["b1", "b2", "g"]),
    ] {
        let decision = decide(&critical(millis), &roomy, &held);
        assert_eq!(preempted(&decision), victims, "{millis}");
        assert!(matches!(&decision, Decision::Preempt { signal, .. } if signal == "cpu"));
    }
    // Room among the pods: the best-effort one is enough.
    let decision = decide(&critical(0), &node(), &held);
    assert_eq!(preempted(&decision), ["e"]);
    assert!(matches!(&decision, Decision::Preempt { signal, .. } if signal == "pods"));
    assert_eq!(decide(&critical(100), &roomy, &held), Decision::Admitted);
}

#[test]
fn a11_who_cannot_be_preempted_and_what_is_said_then() {
    let nobody = "UnexpectedAdmissionError: Unexpected error while attempting to recover from admission failure: preemption: \
                  error finding a set of pods to preempt: no set of running pods found to reclaim resources: [(res: cpu, q: 500), ]";
    let held = holding(&[asking("equal", 1000, CRITICAL)]);
    assert_eq!(said(&decide(&asking("c", 500, CRITICAL), &node(), &held)), nobody);
    assert_eq!(preempted(&decide(&asking("c", 500, CRITICAL + 1000), &node(), &held)), ["equal"], "by priority");
    let too_much = said(&decide(&asking("c", 1500, CRITICAL), &node(), &holding(&[asking("a", 500, 0)])));
    assert!(too_much.ends_with("[(res: cpu, q: 500), ]"), "{too_much}");
    // A pod that is not critical never preempts, whatever its priority.
    let ordinary = decide(&asking("p", 500, CRITICAL - 1), &node(), &holding(&[asking("a", 1000, 0)]));
    assert!(said(&ordinary).starts_with("OutOfcpu"));
    // Another reason than resources: no victim dies in vain.
    let unfit = named(
        "u",
        json!({"priority": CRITICAL, "nodeSelector": {"zone": "b"},
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}),
    );
    assert!(said(&decide(&unfit, &node(), &holding(&[asking("a", 1000, 0)]))).starts_with("NodeAffinity"));
    let confined = named(
        "u",
        json!({"priority": CRITICAL, "securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}),
    );
    assert!(said(&decide(&confined, &node(), &holding(&[asking("a", 1000, 0)]))).starts_with("AppArmor"));
}

#[test]
fn a11_a_promised_place_is_not_given_twice() {
    let mut held = holding(&[asking("victim", 900, 0), asking("critical", 500, CRITICAL)]);
    held[0].leaving = true;
    let waits = Decision::AdmittedAfter([PodUid::from("victim")].into());
    assert_eq!(decide(&asking("small", 500, 0), &node(), &held), waits, "there is room once the victim has left");
    assert!(said(&decide(&asking("big", 501, 0), &node(), &held)).contains("used: 500"));
    assert_eq!(decide(&asking("none", 0, 0), &node(), &held), Decision::Admitted, "who needs nothing waits for nobody");
    let second = decide(&asking("second", 501, CRITICAL + 1), &node(), &held);
    assert!(
        matches!(&second, Decision::Preempt { victims, leaving, .. } if victims[0].as_str() == "critical" && leaving.len() == 1),
        "{second:?}"
    );
}

prop_compose! {
    fn any_pod(uid: usize)(millis in 0..600_i64, critical in prop::bool::weighted(0.2)) -> Pod {
        asking(&format!("p{uid}"), millis, if critical { CRITICAL } else { 0 })
    }
}

fn any_pods() -> impl Strategy<Value = Vec<Pod>> {
    (1..14_usize).prop_flat_map(|count| (0..count).map(any_pod).collect::<Vec<_>>())
}

/// Who holds a place, and for whom it waits.
type Held = (Occupant, BTreeSet<PodUid>);

proptest! {
    /// Whatever comes: those who hold a place and are to keep it fit on the node, and so do those who run at any moment.
    #[test]
    fn a01_a11_the_node_is_never_promised_twice(pods in any_pods(), leave in prop::collection::vec(any::<bool>(), 14)) {
        let node = node();
        let allocatable = Demand::of_texts(&node.allocatable);
        let mut held: Vec<Held> = Vec::new();
        for (pod, leaves) in pods.iter().zip(leave) {
            let others: Vec<Occupant> = held.iter().map(|(o, _)| o.clone()).collect();
            let waits = match decide(pod, &node, &others) {
                Decision::Admitted => Some(BTreeSet::new()),
                Decision::AdmittedAfter(leaving) => Some(leaving),
                Decision::Preempt { victims, mut leaving, .. } => {
                    for (occupant, _) in held.iter_mut().filter(|(o, _)| victims.contains(o.pod.uid())) {
                        prop_assert!(!occupant.leaving);
                        occupant.leaving = true;
                    }
                    leaving.extend(victims);
                    Some(leaving)
                }
                Decision::Rejected { .. } => None,
            };
            if let Some(waits) = waits {
                held.push((Occupant::new(pod.clone()), waits));
            }
            let sum = |which: fn(&Held) -> bool| {
                let counted: Vec<_> = held.iter().filter(|h| which(h)).collect();
                (counted.iter().map(|(o, _)| o.demand.get("cpu")).sum::<i64>(), counted.len() as i64)
            };
            let (kept, running) = (sum(|(o, _)| !o.leaving), sum(|(_, waits)| waits.is_empty()));
            prop_assert!(kept.0 <= allocatable.get("cpu") && kept.1 <= allocatable.get("pods"), "promised {kept:?}");
            prop_assert!(running.0 <= allocatable.get("cpu") && running.1 <= allocatable.get("pods"), "running {running:?}");
            if leaves {
                let gone: Vec<_> = held.iter().filter(|(o, _)| o.leaving).map(|(o, _)| o.pod.uid().clone()).collect();
                held.retain(|(o, _)| !o.leaving);
                for (_, waits) in &mut held {
                    waits.retain(|uid| !gone.contains(uid));
                }
            }
        }
    }

    /// The order in which the others are kept changes neither whether a pod is admitted nor what is said.
    #[test]
    fn a01_the_order_of_the_others_does_not_matter(pods in any_pods(), turn in 0..14_usize) {
        let Some((last, others)) = pods.split_last() else { return Ok(()) };
        let held = holding(others);
        let mut turned = held.clone();
        turned.rotate_left(turn % held.len().max(1));
        let kind = |d: &Decision| match d {
            Decision::Preempt { victims, signal, .. } => format!("{} for {signal}", victims.len()),
            other => said(other),
        };
        prop_assert_eq!(kind(&decide(last, &node(), &held)), kind(&decide(last, &node(), &turned)));
    }
}
