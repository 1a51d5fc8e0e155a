package bundle

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
)

// program is an ELF file, possibly at the begin of a longer file.
type program struct {
	architecture string // of Go
	size         int64  // without what follows it
}

// errNotELF means that a file does not begin with an executable.
var errNotELF = errors.New("it does not begin with an executable")

// readELF returns the program at the begin of r, which has size bytes.
func readELF(r io.ReaderAt, size int64) (p program, err error) {
	f, err := elf.NewFile(io.NewSectionReader(r, 0, size))
	if err != nil {
		return p, errNotELF
	}
	defer f.Close()
	switch f.Machine {
	case elf.EM_X86_64:
		p.architecture = "amd64"
	case elf.EM_AARCH64:
		p.architecture = "arm64"
	default:
		return p, fmt.Errorf("it is an executable for %s, for which there is no kedge", f.Machine)
	}
	for _, s := range f.Progs {
		p.size = max(p.size, end(s.Off, s.Filesz))
	}
	for _, s := range f.Sections {
		if s.Type != elf.SHT_NOBITS && s.Type != elf.SHT_NULL {
			p.size = max(p.size, end(s.Offset, s.FileSize))
		}
	}
	// The table of sections is at the end of files that some linkers write.
	var header [64]byte
	if _, err := r.ReadAt(header[:], 0); err != nil || f.Class != elf.ELFCLASS64 {
		return p, errNotELF
	}
	p.size = max(p.size, end(f.ByteOrder.Uint64(header[0x28:]), uint64(f.ByteOrder.Uint16(header[0x3a:]))*uint64(f.ByteOrder.Uint16(header[0x3c:]))))
	if p.size <= 0 || p.size > size {
		return p, errors.New("its executable is cut off")
	}
	return p, nil
}

// end returns the end of a stretch, or the largest number if it cannot be in a file.
func end(offset, size uint64) int64 {
	const most = 1<<63 - 1
	if offset > most || size > most-offset {
		return most
	}
	return int64(offset + size)
}
