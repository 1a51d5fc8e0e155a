package control

import (
	"bytes"
	"os"
	"strconv"
)

// OwnMemory reads this process's resident memory from /proc/self/status. Fields
// that the kernel does not give are zero.
func OwnMemory() Memory {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return Memory{}
	}
	var m Memory
	for line := range bytes.Lines(data) {
		name, rest, _ := bytes.Cut(line, []byte(":"))
		fields := bytes.Fields(rest)
		if len(fields) == 0 {
			continue
		}
		kib, _ := strconv.ParseInt(string(fields[0]), 10, 64)
		switch string(name) {
		case "VmRSS":
			m.Resident = kib << 10
		case "RssAnon":
			m.Anonymous = kib << 10
		}
	}
	return m
}
