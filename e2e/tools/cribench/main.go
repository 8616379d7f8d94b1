// cribench measures what the container runtime itself needs for a pod: the same CRI calls, image, command and cgroup
// shape that a node agent uses, and nothing else around them. It prints one JSON object; all times are milliseconds.
//
//	cribench -socket S -image I -cgroup /root/kubepods/besteffort -rounds 12 -crowds 30,100 [-exec true] -- command...
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	namespace   = "cribench"
	dialTimeout = 10 * time.Second
	callTimeout = 5 * time.Minute
	stopGrace   = 30 // seconds, as a pod's default
)

// settings are the flags.
type settings struct {
	socket, image, cgroup, logs string
	rounds                      int
	crowds                      []int
	exec                        []string
	command                     []string
}

// crowd is what many pods at once took, each counted from the common start.
type crowd struct {
	Pods  int       `json:"pods"`
	Start []float64 `json:"start"`
	Gone  []float64 `json:"gone"`
}

type figures struct {
	Runtime string    `json:"runtime"`
	Start   []float64 `json:"start"` // RunPodSandbox + CreateContainer + StartContainer
	Exec    []float64 `json:"exec"`  // ExecSync, when asked for
	Gone    []float64 `json:"gone"`  // StopContainer + StopPodSandbox + RemovePodSandbox
	Crowds  []crowd   `json:"crowds"`
}

// pod is one sandbox with one container. Its ids are empty until the runtime has given them.
type pod struct {
	uid                string
	sandbox, container string
}

type bench struct {
	settings
	runtime cri.RuntimeServiceClient
}

func main() {
	wanted, err := parse()
	if err == nil {
		err = run(wanted)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cribench:", err)
		os.Exit(1)
	}
}

func parse() (settings, error) {
	var wanted settings
	var crowds, exec string
	flag.StringVar(&wanted.socket, "socket", "", "the runtime's CRI socket, a path")
	flag.StringVar(&wanted.image, "image", "", "image of the container; it must be there already")
	flag.StringVar(&wanted.cgroup, "cgroup", "", "parent of the pods' cgroups")
	flag.StringVar(&wanted.logs, "logs", "", "folder for container logs")
	flag.IntVar(&wanted.rounds, "rounds", 12, "pods one at a time")
	flag.StringVar(&crowds, "crowds", "", "numbers of pods at once, with commas")
	flag.StringVar(&exec, "exec", "", "a command to measure ExecSync with")
	flag.Parse()
	wanted.command = flag.Args()
	wanted.exec = strings.Fields(exec)
	for _, word := range strings.FieldsFunc(crowds, func(r rune) bool { return r == ',' }) {
		number, err := strconv.Atoi(word)
		if err != nil {
			return wanted, fmt.Errorf("-crowds: %w", err)
		}
		wanted.crowds = append(wanted.crowds, number)
	}
	if wanted.socket == "" || wanted.image == "" || wanted.cgroup == "" || wanted.logs == "" {
		return wanted, errors.New("-socket, -image, -cgroup and -logs are needed")
	}
	return wanted, nil
}

func run(wanted settings) error {
	connection, err := grpc.NewClient("unix://"+wanted.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	b := &bench{settings: wanted, runtime: cri.NewRuntimeServiceClient(connection)}

	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	version, err := b.runtime.Version(ctx, &cri.VersionRequest{})
	if err != nil {
		return err
	}
	result := figures{Runtime: version.RuntimeName + " " + version.RuntimeVersion}
	if err := b.oneAtATime(&result); err != nil {
		return err
	}
	for _, size := range b.crowds {
		many, err := b.atOnce(size)
		if err != nil {
			return err
		}
		result.Crowds = append(result.Crowds, many)
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

func (b *bench) oneAtATime(result *figures) error {
	for number := range b.rounds {
		p := newPod(number)
		begin := time.Now()
		err := b.start(p)
		result.Start = append(result.Start, since(begin))
		if err == nil && len(b.exec) > 0 {
			begin = time.Now()
			err = b.execSync(p)
			result.Exec = append(result.Exec, since(begin))
		}
		begin = time.Now()
		err = errors.Join(err, b.remove(p))
		result.Gone = append(result.Gone, since(begin))
		b.clean(p)
		if err != nil {
			return fmt.Errorf("pod %d: %w", number, err)
		}
	}
	return nil
}

// atOnce starts a number of pods in parallel, then removes them in parallel.
func (b *bench) atOnce(size int) (crowd, error) {
	pods := make([]*pod, size)
	for number := range pods {
		pods[number] = newPod(number)
	}
	result := crowd{Pods: size}
	var err error
	if result.Start, err = inParallel(pods, b.start); err != nil {
		err = fmt.Errorf("starting %d: %w", size, err)
	}
	var failure error
	if result.Gone, failure = inParallel(pods, b.remove); failure != nil {
		err = errors.Join(err, fmt.Errorf("removing %d: %w", size, failure))
	}
	for _, p := range pods {
		b.clean(p)
	}
	return result, err
}

func inParallel(pods []*pod, do func(*pod) error) ([]float64, error) {
	times, failures := make([]float64, len(pods)), make([]error, len(pods))
	var group sync.WaitGroup
	begin := time.Now()
	for number, p := range pods {
		group.Go(func() {
			failures[number] = do(p)
			times[number] = since(begin)
		})
	}
	group.Wait()
	return times, errors.Join(failures...)
}

func newPod(number int) *pod {
	return &pod{uid: fmt.Sprintf("cribench-%d-%d", time.Now().UnixNano(), number)}
}

func (b *bench) logFolder(p *pod) string { return filepath.Join(b.logs, namespace+"_"+p.uid) }

func (b *bench) cgroupOf(p *pod) string { return filepath.Join(b.cgroup, "pod"+p.uid) }

func (b *bench) sandboxConfig(p *pod) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: p.uid, Uid: p.uid, Namespace: namespace},
		Hostname:     "cribench",
		LogDirectory: b.logFolder(p),
		DnsConfig:    &cri.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"cluster.local"}, Options: []string{"ndots:5"}},
		Labels: map[string]string{"io.kubernetes.pod.name": p.uid, "io.kubernetes.pod.namespace": namespace,
			"io.kubernetes.pod.uid": p.uid},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: b.cgroupOf(p),
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
				Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
			},
			Resources: &cri.LinuxContainerResources{CpuShares: 2},
		},
	}
}

func (b *bench) containerConfig(p *pod) *cri.ContainerConfig {
	return &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "main"},
		Image:    &cri.ImageSpec{Image: b.image},
		Args:     b.command,
		LogPath:  "main/0.log",
		Labels: map[string]string{"io.kubernetes.container.name": "main", "io.kubernetes.pod.name": p.uid,
			"io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.uid": p.uid},
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
				Seccomp:          &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined},
			},
		},
	}
}

func (b *bench) start(p *pod) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if err := os.MkdirAll(filepath.Join(b.logFolder(p), "main"), 0o755); err != nil {
		return err
	}
	config := b.sandboxConfig(p)
	sandbox, err := b.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return fmt.Errorf("RunPodSandbox: %w", err)
	}
	p.sandbox = sandbox.PodSandboxId
	container, err := b.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: p.sandbox, Config: b.containerConfig(p), SandboxConfig: config})
	if err != nil {
		return fmt.Errorf("CreateContainer: %w", err)
	}
	p.container = container.ContainerId
	if _, err := b.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: p.container}); err != nil {
		return fmt.Errorf("StartContainer: %w", err)
	}
	return nil
}

func (b *bench) execSync(p *pod) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	answer, err := b.runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: p.container, Cmd: b.exec, Timeout: 10})
	if err == nil && answer.ExitCode != 0 {
		err = fmt.Errorf("exit code %d", answer.ExitCode)
	}
	if err != nil {
		return fmt.Errorf("ExecSync: %w", err)
	}
	return nil
}

// remove takes away as much of the pod as there is.
func (b *bench) remove(p *pod) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var failures []error
	note := func(call string, err error) {
		if err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", call, err))
		}
	}
	if p.container != "" {
		_, err := b.runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: p.container, Timeout: stopGrace})
		note("StopContainer", err)
	}
	if p.sandbox != "" {
		_, err := b.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox})
		note("StopPodSandbox", err)
		_, err = b.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
		note("RemovePodSandbox", err)
	}
	return errors.Join(failures...)
}

// clean removes what the runtime leaves to its caller: the log folder and the pod's own cgroup in each hierarchy (v1 or
// v2). A busy cgroup is left to `make down`.
func (b *bench) clean(p *pod) {
	os.RemoveAll(b.logFolder(p))
	os.Remove(filepath.Join("/sys/fs/cgroup", b.cgroupOf(p)))
	folders, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup/*", b.cgroupOf(p)))
	for _, folder := range folders {
		os.Remove(folder)
	}
}

func since(begin time.Time) float64 {
	return float64(time.Since(begin).Microseconds()) / 1000
}
