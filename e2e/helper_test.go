package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// helper is the command line that runs the test binary as a small program, in a container for instance.
func helper(args ...string) []string {
	self, err := os.Executable()
	if err != nil {
		panic(err) // Linux has /proc/self/exe
	}
	return append([]string{self, "helper"}, args...)
}

// helperMain is what the test binary does as `helper NAME ARG...`.
func helperMain(name string, args []string) int {
	helpers := map[string]func(args []string) error{
		"pattern": helperPattern,
		"churn":   helperChurn,
		"idle":    helperIdle,
		"crowd":   helperCrowd,
		"echo":    helperEcho,
		"wire":    helperWire,
		"refuse":  helperRefuse,
	}
	if err := helpers[name](args); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	return 0
}

// pattern N writes N octets of the pattern.
func helperPattern(args []string) error {
	n, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return err
	}
	return writePattern(os.Stdout, n)
}

// churn ADDR N opens and closes N connections to an echo server, 32 at a time, with an octet there and back on each.
func helperChurn(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	todo := make(chan struct{})
	errs := make(chan error, n)
	var workers sync.WaitGroup
	for range 32 {
		workers.Go(func() {
			for range todo {
				if err := roundTrip(args[0]); err != nil {
					errs <- err
				}
			}
		})
	}
	for range n {
		todo <- struct{}{}
	}
	close(todo)
	workers.Wait()
	close(errs)
	failed := len(errs)
	if failed > 0 {
		return fmt.Errorf("%d of %d connections failed: %w", failed, n, <-errs)
	}
	return nil
}

func roundTrip(addr string) error {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	return ping(c)
}

// ping sends an octet and waits for it.
func ping(c net.Conn) error {
	b := []byte{'x'}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// idle ADDR N opens N connections, says "open", and holds them until its standard input ends.
func helperIdle(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	conns := make([]net.Conn, 0, n)
	for range n {
		c, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		defer c.Close()
		if err := ping(c); err != nil {
			return err
		}
		conns = append(conns, c)
	}
	fmt.Println("open")
	io.Copy(io.Discard, os.Stdin)
	// They still carry.
	for _, c := range conns {
		if err := ping(c); err != nil {
			return err
		}
	}
	fmt.Println("alive")
	return nil
}

// crowd ADDR N connects N times at once, with an octet there and back on each, says how many were served, reset and failed
// otherwise, and holds those that were served until its standard input ends. Then it says how many of them still carry.
func helperCrowd(args []string) error {
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var served []net.Conn
	var reset, failed int
	var last error
	var dials sync.WaitGroup
	start := make(chan struct{})
	for range n {
		dials.Go(func() {
			<-start
			c, err := net.DialTimeout("tcp", args[0], patience)
			if err == nil {
				c.SetDeadline(time.Now().Add(patience))
				err = ping(c)
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				served = append(served, c)
				return
			case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
				reset++
			default:
				failed++
				last = err
			}
			if c != nil {
				c.Close()
			}
		})
	}
	close(start)
	dials.Wait()
	fmt.Printf("served %d reset %d failed %d %v\n", len(served), reset, failed, last)
	io.Copy(io.Discard, os.Stdin)
	alive := 0
	for i, c := range served {
		c.SetDeadline(time.Now().Add(patience))
		if ping(c) == nil {
			alive++
		}
		if i%2 == 0 {
			c.(*net.TCPConn).SetLinger(0) // no TIME-WAIT: another crowd may come
		}
		c.Close()
	}
	fmt.Printf("alive %d\n", alive)
	return nil
}

// echo ADDR is a server that says "listening", and echoes until it is killed.
func helperEcho(args []string) error {
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			echo(c.(*net.TCPConn))
		}()
	}
}
