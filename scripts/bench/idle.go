package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ticks is USER_HZ, which is 100 on all supported architectures.
const ticks = 100

// usage has the figures of one or more processes from /proc, in bytes and seconds.
type usage struct {
	resident, anonymous, file, proportional float64
	cpu, written                            float64
}

func (u usage) plus(v usage) usage {
	return usage{u.resident + v.resident, u.anonymous + v.anonymous, u.file + v.file, u.proportional + v.proportional, u.cpu + v.cpu, u.written + v.written}
}

// fieldsOf parses the "name: number unit" lines of a file in /proc.
func fieldsOf(path string) (map[string]float64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for line := range strings.Lines(string(data)) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if !ok || len(f) == 0 {
			continue
		}
		v, err := strconv.ParseFloat(f[0], 64)
		if err != nil {
			continue
		}
		if len(f) > 1 && f[1] == "kB" {
			v *= 1024
		}
		out[name] = v
	}
	return out, nil
}

func usageOf(pids []int) (usage, error) {
	var sum usage
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		status, err := fieldsOf(filepath.Join(dir, "status"))
		if err != nil {
			return sum, err
		}
		io, err := fieldsOf(filepath.Join(dir, "io"))
		if err != nil {
			return sum, err
		}
		rollup, err := fieldsOf(filepath.Join(dir, "smaps_rollup"))
		if err != nil {
			return sum, err
		}
		stat, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			return sum, err
		}
		// The second field is the name, which may contain any character.
		f := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(f) < 13 {
			return sum, fmt.Errorf("%s/stat: %q", dir, stat)
		}
		user, err := strconv.ParseFloat(f[11], 64)
		if err != nil {
			return sum, err
		}
		system, err := strconv.ParseFloat(f[12], 64)
		if err != nil {
			return sum, err
		}
		sum = sum.plus(usage{
			resident: status["VmRSS"], anonymous: status["RssAnon"], file: status["RssFile"], proportional: rollup["Pss"],
			cpu: (user + system) / ticks, written: io["write_bytes"],
		})
	}
	return sum, nil
}

// deviceWritten returns the number of bytes that all processes have written to the block device below dir, and
// false if dir is not on a block device.
func deviceWritten(dir string) (float64, bool) {
	var st syscall.Stat_t
	if err := syscall.Stat(dir, &st); err != nil {
		return 0, false
	}
	major, minor := (st.Dev>>8)&0xfff, st.Dev&0xff|(st.Dev>>12)&0xfff00
	data, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", major, minor))
	if err != nil {
		return 0, false
	}
	f := strings.Fields(string(data))
	if len(f) < 7 {
		return 0, false
	}
	sectors, err := strconv.ParseFloat(f[6], 64)
	return sectors * 512, err == nil
}

// idle measures a composition without requests and pods.
func idle(ctx context.Context, o options, c composition, r *report) error {
	if err := sleep(ctx, o.rest); err != nil {
		return err
	}
	before, err := usageOf(c.processes())
	if err != nil {
		return err
	}
	device, onDevice := deviceWritten(o.dir)
	began := time.Now()
	if err := sleep(ctx, o.idle); err != nil {
		return err
	}
	seconds := time.Since(began).Seconds()
	after, err := usageOf(c.processes())
	if err != nil {
		return err
	}
	const day = 24 * 60 * 60
	r.add(figure{"resident memory, idle", "MB"}, c.name(), after.resident/1e6)
	r.add(figure{"anonymous memory, idle", "MB"}, c.name(), after.anonymous/1e6)
	r.add(figure{"memory of files, idle", "MB"}, c.name(), after.file/1e6)
	r.add(figure{"proportional memory (PSS), idle", "MB"}, c.name(), after.proportional/1e6)
	r.add(figure{"CPU at idle, of one core", "%"}, c.name(), 100*(after.cpu-before.cpu)/seconds)
	r.add(figure{"written at idle", "GB/day"}, c.name(), (after.written-before.written)/seconds*day/1e9)
	if now, ok := deviceWritten(o.dir); ok && onDevice {
		r.add(figure{"written to the device meanwhile, by all programs", "GB/day"}, c.name(), (now-device)/seconds*day/1e9)
	}
	return nil
}
