package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"
)

// measure answers datagrams with their length, and connections by their first line: what
// follows "echo" comes back, and what follows "count" is counted.
func measure(addr string) error {
	u, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				os.Exit(1)
			}
			_, _ = u.WriteTo([]byte(strconv.Itoa(n)), from)
		}
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			r := bufio.NewReader(c)
			switch what, _ := r.ReadString('\n'); what {
			case "echo\n":
				_, _ = io.Copy(c, r)
			case "count\n":
				n, _ := io.Copy(io.Discard, r)
				fmt.Fprintln(c, n)
			}
		}()
	}
}

// whole sends one packet of a size, headers of IPv4 included, that nobody may divide.
func whole(addr string, size int) error {
	c, err := net.Dial("udp4", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	if err != nil {
		return err
	}
	var bad error
	err = raw.Control(func(fd uintptr) {
		bad = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_MTU_DISCOVER, syscall.IP_PMTUDISC_DO)
	})
	if err != nil || bad != nil {
		return fmt.Errorf("%v %v", err, bad)
	}
	payload := make([]byte, size-28)
	buf := make([]byte, 64)
	for range 5 { // one may be lost
		if _, err = c.Write(payload); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		var n int
		if n, err = c.Read(buf); err == nil {
			if string(buf[:n]) != strconv.Itoa(len(payload)) {
				return fmt.Errorf("%s bytes arrived of %d", buf[:n], len(payload))
			}
			return nil
		}
	}
	return err
}

// throw sends megabytes over one connection and prints how many a second.
func throw(addr string, mib int) error {
	c, err := net.DialTimeout("tcp", addr, 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	begin, piece := time.Now(), make([]byte, 1<<20)
	if _, err := io.WriteString(c, "count\n"); err != nil {
		return err
	}
	for range mib {
		if _, err := c.Write(piece); err != nil {
			return err
		}
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if answer != fmt.Sprintln(mib<<20) {
		return fmt.Errorf("%s bytes arrived", answer)
	}
	fmt.Printf("%.0f MB/s\n", float64(mib<<20)/time.Since(begin).Seconds()/1e6)
	return nil
}

// soak sends and gets back pieces of all sizes over one connection for some seconds, and
// prints how many, and the longest that one took.
func soak(addr string, seconds int) error {
	c, err := net.DialTimeout("tcp", addr, 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "echo\n"); err != nil {
		return err
	}
	end := time.Now().Add(time.Duration(seconds) * time.Second)
	var longest time.Duration
	count := 0
	for ; time.Now().Before(end); count++ {
		begin := time.Now()
		piece := make([]byte, 1+count*997%65536)
		for i := range piece {
			piece[i] = byte(count + i)
		}
		_ = c.SetDeadline(begin.Add(5 * time.Second))
		got := make([]byte, len(piece))
		sent := make(chan error, 1)
		go func() { _, err := c.Write(piece); sent <- err }()
		if _, err := io.ReadFull(c, got); err != nil {
			return fmt.Errorf("piece %d: %w", count, err)
		}
		if err := <-sent; err != nil {
			return fmt.Errorf("piece %d: %w", count, err)
		}
		if string(got) != string(piece) {
			return fmt.Errorf("piece %d came back as another", count)
		}
		longest = max(longest, time.Since(begin))
	}
	fmt.Printf("%d pieces, the slowest took %s\n", count, longest.Round(time.Millisecond))
	return nil
}
