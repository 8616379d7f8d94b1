//! Resources: QoS class, the kubepods cgroup tree, allocatable (contract section 8).
