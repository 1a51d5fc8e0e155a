// Up measures and stresses throwaway clusters: `make bench-up`.
//
// For one and three nodes, with and without a template, it prints how long "kedge up" takes until all nodes are
// Ready, until DNS answers and until a first pod is Running, how long "kedge down" takes, and how much memory a
// node needs. With -stress it creates and removes clusters and kills kedge at random times, and fails if a
// trace is left. It is not part of the product.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/internal/test/image"
)

type bench struct {
	kedge, dir string
}

func main() {
	var b bench
	runs := flag.Int("n", 3, "runs of each kind; the median is printed")
	stress := flag.Int("stress", 0, "instead of measuring, create and remove this number of clusters with kills at random times")
	flag.StringVar(&b.kedge, "kedge", "bin/kedge", "executable")
	flag.Parse()
	if err := b.run(*runs, *stress); err != nil {
		fmt.Fprintln(os.Stderr, "up:", err)
		os.Exit(1)
	}
}

func (b bench) run(runs, stress int) (err error) {
	if b.dir, err = os.MkdirTemp("/tmp", "kedge-up-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	defer func() {
		if out, downErr := b.command("down", "--all").CombinedOutput(); downErr != nil {
			err = errors.Join(err, fmt.Errorf("kedge down: %w: %s", downErr, out))
		}
	}()
	if stress > 0 {
		return b.stress(stress)
	}
	if err := b.writePod(); err != nil {
		return err
	}
	fmt.Printf("%-24s %10s %10s %10s %10s %14s\n", "", "nodes", "DNS", "first pod", "down", "memory a node")
	for _, agents := range []int{0, 2} {
		for _, cold := range []bool{true, false} {
			var all [][]float64
			for range runs {
				one, err := b.measure(agents, cold)
				if err != nil {
					return err
				}
				all = append(all, one)
			}
			how := "template"
			if cold {
				how = "cold"
			}
			fmt.Printf("%-24s", fmt.Sprintf("%d nodes, %s", agents+1, how))
			for i, unit := range []string{" s", " s", " s", " s", " MiB"} {
				var column []float64
				for _, one := range all {
					column = append(column, one[i])
				}
				slices.Sort(column)
				width, digits := 8, 2
				if i == 4 {
					width, digits = 10, 0
				}
				fmt.Printf(" %*.*f%s", width, digits, column[len(column)/2], unit)
			}
			fmt.Println()
		}
	}
	return nil
}

func (b bench) command(args ...string) *exec.Cmd {
	cmd := exec.Command(b.kedge, args...)
	cmd.Env = append(os.Environ(), "KEDGE_CLUSTERS="+filepath.Join(b.dir, "clusters"), "KUBECONFIG="+filepath.Join(b.dir, "kubeconfig"))
	return cmd
}

func (b bench) archive() string  { return filepath.Join(b.dir, "image.tar") }
func (b bench) manifest() string { return filepath.Join(b.dir, "pod.yaml") }

// writePod writes an image and a pod that uses it.
func (b bench) writePod() error {
	program, err := os.ReadFile("build/e2e/probe")
	if err != nil {
		return fmt.Errorf("%w; run make build-e2e", err)
	}
	err = image.WriteFile(b.archive(), image.Docker, image.Image{
		Name: "example.org/probe:1", Files: map[string]image.File{"/probe": {Data: program, Mode: 0o755}},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(b.manifest(), []byte(`{apiVersion: v1, kind: Pod, metadata: {name: first}, spec: {containers: [{name: first, image: "example.org/probe:1", command: [/probe, serve, ":8080", x]}]}}`), 0o644)
}

// measure returns the seconds from the command until nodes, DNS and first pod are ready, the seconds of "down",
// and the private memory of a node's kedge in MiB.
func (b bench) measure(agents int, cold bool) ([]float64, error) {
	if cold {
		if out, err := b.command("down", "--all").CombinedOutput(); err != nil {
			return nil, fmt.Errorf("kedge down: %w: %s", err, out)
		}
	}
	cmd := b.command("up", fmt.Sprint("--agents=", agents), "--image="+b.archive(), "--manifest="+b.manifest())
	reported, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var text strings.Builder
	times := map[string]float64{}
	buf := make([]byte, 4096)
	for {
		n, err := reported.Read(buf)
		text.Write(buf[:n])
		for _, word := range []string{"are Ready", "DNS answers", "of manifests"} {
			if times[word] == 0 && strings.Contains(text.String(), word) {
				times[word] = time.Since(begin).Seconds()
			}
		}
		if err != nil {
			break
		}
	}
	if err := cmd.Wait(); err != nil {
		return nil, fmt.Errorf("kedge up: %w: %s", err, text.String())
	}
	memory, err := b.memory(agents + 1)
	if err != nil {
		return nil, err
	}
	begin = time.Now()
	if out, err := b.command("down").CombinedOutput(); err != nil {
		return nil, fmt.Errorf("kedge down: %w: %s", err, out)
	}
	return []float64{times["are Ready"], times["DNS answers"], times["of manifests"], time.Since(begin).Seconds(), memory}, nil
}

// memory returns the memory of the nodes' kedge processes; each page is divided by the number of processes that
// share it.
func (b bench) memory(nodes int) (float64, error) {
	total := 0.0
	files, err := filepath.Glob("/proc/[0-9]*/smaps_rollup")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		command, err := os.ReadFile(filepath.Join(filepath.Dir(f), "cmdline"))
		if err != nil || !bytes.HasPrefix(command, []byte("kedge\x00server")) && !bytes.HasPrefix(command, []byte("kedge\x00agent")) || !onMachine(filepath.Dir(f)) {
			continue
		}
		data, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if m := pss.FindSubmatch(data); m != nil {
			kib, _ := strconv.Atoi(string(m[1]))
			total += float64(kib) / 1024
		}
	}
	return total / float64(nodes), nil
}

// onMachine reports whether a process, given by its folder in /proc, runs on a machine of a cluster.
func onMachine(dir string) bool {
	groups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
	return err == nil && bytes.Contains(groups, []byte("/kedge-machines-"))
}

var pss = regexp.MustCompile(`(?m)^Pss:\s+(\d+) kB`)

// stress creates clusters and kills at random: during up, during down, or not at all.
func (b bench) stress(cycles int) error {
	before, err := traces(b.dir)
	if err != nil {
		return err
	}
	if out, err := b.command("up").CombinedOutput(); err != nil { // this also makes the template
		return fmt.Errorf("kedge up: %w: %s", err, out)
	}
	if out, err := b.command("down").CombinedOutput(); err != nil {
		return fmt.Errorf("kedge down: %w: %s", err, out)
	}
	killed := 0
	for i := range cycles {
		args := []string{"up"}
		if rand.IntN(3) == 0 {
			args = append(args, "--agents=1")
		}
		if rand.IntN(3) == 0 {
			args = []string{"up", "--ephemeral", "--", "sleep", "0.2"}
		}
		for _, step := range [][]string{args, {"down"}} {
			cmd := b.command(step...)
			if err := cmd.Start(); err != nil {
				return err
			}
			limit := 8 * time.Second
			if step[0] == "down" {
				limit = 800 * time.Millisecond
			}
			timer := time.AfterFunc(time.Duration(rand.Int64N(int64(limit))), func() { _ = cmd.Process.Kill() })
			_ = cmd.Wait()
			if timer.Stop(); cmd.ProcessState.ExitCode() < 0 {
				killed++
			}
		}
		// Complete clusters are removed; the next call removes incomplete ones itself.
		if out, err := b.command("ls").CombinedOutput(); err != nil {
			return fmt.Errorf("cycle %d: kedge ls: %w: %s", i, err, out)
		} else if bytes.Contains(out, []byte("server-1")) {
			if out, err := b.command("down").CombinedOutput(); err != nil {
				return fmt.Errorf("cycle %d: kedge down: %w: %s", i, err, out)
			}
		}
		after, err := traces(b.dir)
		if err != nil {
			return err
		}
		for _, line := range after {
			if !slices.Contains(before, line) {
				return fmt.Errorf("cycle %d left a trace: %s", i, line)
			}
		}
	}
	fmt.Printf("%d cycles, %d commands killed; nothing was left behind\n", cycles, killed)
	return nil
}

// traces returns the objects that clusters could leave behind.
func traces(dir string) ([]string, error) {
	var all []string
	for _, pattern := range []string{"/sys/fs/cgroup/kedge-machines-*", "/sys/fs/cgroup/*/kedge-machines-*", "/sys/class/net/kdm-*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			all = append(all, "mount "+line)
		}
	}
	commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, c := range commands {
		if data, err := os.ReadFile(c); err == nil && len(data) > 0 && onMachine(filepath.Dir(c)) {
			all = append(all, "process "+c+" "+string(data))
		}
	}
	clusters, err := filepath.Glob(filepath.Join(dir, "clusters", "*"))
	if err != nil {
		return nil, err
	}
	for _, c := range clusters {
		if base := filepath.Base(c); base != "templates" && base != "lock" {
			all = append(all, c)
		}
	}
	return all, nil
}
