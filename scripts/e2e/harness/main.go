package harness

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// root is the project's folder, as the tests of each package see it from their own.
const root = "../../.."

// Binary is the executable under test.
func Binary() string {
	if b := os.Getenv("KEDGE_BIN"); b != "" {
		return b
	}
	return InProject("bin/kedge")
}

// InProject is the absolute path of a file of the project, by its path from the project's folder.
func InProject(path string) string {
	p, err := filepath.Abs(filepath.Join(root, path))
	if err != nil {
		panic(err)
	}
	return p
}

// BaseDir is the folder of everything that the run writes. It is removed at the end.
var BaseDir string

// lastPort is the API port of the latest node; the next one has the one after its kubelet's.
var lastPort atomic.Int32

// FreePort is a port that no node of the run listens on.
func FreePort() int { return int(lastPort.Load()) + 1001 }

// portVar moves a run's ports and names, so that it can go on beside another.
const portVar = "KEDGE_E2E_PORT"

// slowVar says how many times longer than on a quiet machine of two cores everything may take.
const slowVar = "KEDGE_E2E_SLOW"

// usualSlowness is for machines that do other things meanwhile. It costs time only where a test fails.
const usualSlowness = 3

// slowness is by how much waits are longer.
var slowness = sync.OnceValues(func() (int, error) {
	n, err := strconv.Atoi(cmp.Or(os.Getenv(slowVar), strconv.Itoa(usualSlowness)))
	if err == nil && n < 1 {
		err = fmt.Errorf("%d is no number of times", n)
	}
	return n, err
})

// Patient is how long to wait here for what takes no longer than limit on a quiet machine of two cores.
func Patient(limit time.Duration) time.Duration {
	n, _ := slowness() // Main has looked at the error
	return time.Duration(n) * limit
}

// Main runs the tests of a package and clears up, and returns the exit code. Call it from TestMain.
func Main(m *testing.M) int {
	if w := os.Getenv(worldVar); w != "" {
		fmt.Fprintln(os.Stderr, "enter the world of a test:", enterWorld(w))
		return 125
	}
	if config := os.Getenv(etcdVar); config != "" {
		fmt.Fprintln(os.Stderr, "etcd:", becomeEtcd(config))
		return 1
	}
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: end-to-end tests run containers and need root")
		return 0
	}
	if _, err := os.Stat(Binary()); err != nil {
		fmt.Println("FAIL: no executable to test; run make build:", err)
		return 1
	}
	if err := sweep(); err != nil {
		fmt.Println("FAIL: clear up after an earlier run:", err)
		return 1
	}
	var err error
	if BaseDir, err = takeBaseDir(); err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	clearUpOnSignal(BaseDir)
	// For the program that commands without a data directory unpack.
	if err := os.Setenv("XDG_CACHE_HOME", filepath.Join(BaseDir, "cache")); err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	port, err := strconv.Atoi(cmp.Or(os.Getenv(portVar), "16443"))
	if err != nil {
		fmt.Println("FAIL:", portVar+":", err)
		return 1
	}
	lastPort.Store(int32(port))
	slow, err := slowness()
	if err != nil {
		fmt.Println("FAIL:", slowVar+":", err)
		return 1
	}
	// Tests wait for most of their time, some of them for a slot of [Own]; go test would
	// run one per processor. A machine that is said to be slow has enough to do with one.
	parallel := max(24, goruntime.GOMAXPROCS(0))
	if slow > usualSlowness {
		parallel = 1
	}
	if err := flag.Set("test.parallel", strconv.Itoa(parallel)); err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	code := m.Run()
	reportLacks()
	keep := code != 0 && os.Getenv("KEDGE_KEEP") != ""
	if sharedNode != nil && keep {
		fmt.Println("the node is kept; KUBECONFIG="+sharedNode.Kubeconfig, "process", sharedNode.Cmd.Process.Pid)
		if err := os.WriteFile(filepath.Join(BaseDir, keepFile), nil, 0o600); err != nil {
			fmt.Println("and its folder is not:", err)
		}
		return code
	}
	if sharedNode != nil {
		if err := sharedNode.Destroy(); err != nil {
			fmt.Println("FAIL: clean-up of the shared node:", err)
			code = 1
		}
	}
	if err := removeRun(BaseDir); err != nil {
		fmt.Println("FAIL: clean-up:", err)
		code = 1
	}
	return code
}

// Since is the time since begin, for people.
func Since(begin time.Time) time.Duration { return time.Since(begin).Round(time.Millisecond) }

// UndoOnce makes undo be called once, at the end of the test at the latest.
func UndoOnce(t *testing.T, undo func() error) func() {
	once := sync.OnceFunc(func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(once)
	return once
}
