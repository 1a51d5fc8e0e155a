package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	goruntime "runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// figure is the name and unit of a measured value.
type figure struct{ Name, Unit string }

// report collects the values of all runs.
type report struct {
	Machine string
	Time    time.Time
	Figures []*values
}

type values struct {
	figure
	Kedge []float64 `json:",omitempty"`
	Plain []float64 `json:",omitempty"`
}

func newReport() *report { return &report{Machine: machine(), Time: time.Now()} }

func (r *report) add(f figure, composition string, v float64) {
	i := slices.IndexFunc(r.Figures, func(have *values) bool { return have.figure == f })
	if i < 0 {
		i = len(r.Figures)
		r.Figures = append(r.Figures, &values{figure: f})
	}
	switch composition {
	case "kedge":
		r.Figures[i].Kedge = append(r.Figures[i].Kedge, v)
	default:
		r.Figures[i].Plain = append(r.Figures[i].Plain, v)
	}
}

func (r *report) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "figure\tunit\tkedge\tmin–max\tplain\tmin–max")
	for _, f := range r.Figures {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", f.Name, f.Unit, middle(f.Kedge), middle(f.Plain))
	}
	_ = t.Flush()
}

// middle returns the median, a tab, and the range.
func middle(v []float64) string {
	if len(v) == 0 {
		return "-\t"
	}
	s := slices.Sorted(slices.Values(v))
	median := (s[(len(s)-1)/2] + s[len(s)/2]) / 2
	if len(s) == 1 {
		return short(median) + "\t"
	}
	return short(median) + "\t" + short(s[0]) + "–" + short(s[len(s)-1])
}

func short(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	if v >= 20 {
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (r *report) writeJSON(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// machine describes the machine on which the figures depend, and its load.
func machine() string {
	var kernel, model string
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		kernel = unix.ByteSliceToString(u.Release[:])
	}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	memory, _ := fieldsOf("/proc/meminfo")
	load, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(load), " ")
	return fmt.Sprintf("machine: %d cores (%s, %s), Linux %s, %.1f GB of memory, load %s at the beginning",
		goruntime.NumCPU(), model, goruntime.GOARCH, kernel, memory["MemTotal"]/1e9, first)
}
